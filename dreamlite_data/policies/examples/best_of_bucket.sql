-- Example: fine-tuning rows that are the best-rewarded share of their own bucket, instead of the best of all: no aspect, size, edit
-- type or source is lost because its scores run lower. Try it with
--   dreamlite policy try dreamlite_data/policies/examples/best_of_bucket.sql --dataset sft --set sft_share=0.2

-- @candidates
WITH subjects AS (
    SELECT row_id, caption_id AS subject_id FROM t2i_records UNION ALL SELECT row_id, edit_id FROM edit_records
)
SELECT r.row_id, r.task, r.image_id, r.source_image_id, r.text, r.edit_type, r.edited_fraction, r.edit_mask, r.weight, r.split,
       x.top_share, x.z
FROM dataset_rows r
JOIN subjects s ON s.row_id = r.row_id
JOIN score_ranks x ON x.subject_id = s.subject_id AND x.task = r.task AND x.scorer = 'reward'
WHERE (r.name = 't2i' AND r.version = $t2i_version) OR (r.name = 'edit' AND r.version = $edit_version)

-- @rule best_of_its_bucket margin
$sft_share - top_share

-- @rule far_from_the_worst margin allow=pass_all
z + 3
