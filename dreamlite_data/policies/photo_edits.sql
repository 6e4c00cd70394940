-- Triplets that exact operators made from photos: instruction and target fit by construction, and are checked all the same.

-- @candidates
SELECT e.row_id, 'edit' AS task, e.image_id, e.source_image_id, e.text, e.edit_type, e.edited_fraction, e.edit_mask,
       CAST(1 AS FLOAT) AS weight, e.group_id, e.benchmark, e.width, e.height, e.source_sharpness, e.matches,
       row_number() OVER (
           PARTITION BY e.group_id, e.target_group_id, plain_words(e.text)
           ORDER BY CAST(e.width AS BIGINT) * e.height DESC, e.source_sharpness DESC, e.row_id
       ) AS copy
FROM edit_records e
WHERE e.route = 'exact' AND e.source_image_id IN (SELECT image_id FROM provenance WHERE list_contains($sources, source))

-- @rule unique_triplet allow=pass_all
copy = 1

-- @rule not_in_benchmark when=benchmarks allow=pass_all
benchmark IS NULL

-- @rule large_enough margin allow=pass_all
least(width, height) - $min_side_px

-- @rule sharp margin allow=pass_all
source_sharpness - $min_photo_sharpness

-- @rule something_changed margin allow=pass_all
edited_fraction - $min_edited_fraction

-- @rule edit_matches_instruction allow=pass_all
matches
