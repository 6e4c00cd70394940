-- Fine-tuning: the best-rewarded slice of each task. Rewards are compared within a task only, for scales differ by model.

-- @candidates
WITH rewards AS (
    SELECT row_id, reward FROM t2i_records UNION ALL SELECT row_id, reward FROM edit_records
)
SELECT r.row_id, r.task, r.image_id, r.source_image_id, r.text, r.edit_type, r.edited_fraction, r.edit_mask, r.weight, r.split,
       percent_rank() OVER (PARTITION BY r.task ORDER BY x.reward, r.row_id) AS reward_rank
FROM dataset_rows r
JOIN rewards x ON x.row_id = r.row_id AND x.reward IS NOT NULL
WHERE (r.name = 't2i' AND r.version = $t2i_version) OR (r.name = 'edit' AND r.version = $edit_version)

-- @rule high_reward margin
reward_rank - (1 - $sft_share)
