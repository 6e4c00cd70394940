-- Triplets made from photos. Exact operations fit their words by construction and are checked by doing them again; composites and edits
-- by models must pass the rules of their type.

-- @candidates
SELECT e.row_id, 'edit' AS task, e.image_id, e.source_image_id, e.text, e.edit_type, e.edited_fraction, e.edit_mask,
       CAST(1 AS FLOAT) AS weight, e.group_id, e.benchmark, e.width, e.height, e.matches, e.route, e.rejected, e.triplet_verdict,
       e.nsfw, e.face_fraction, e.watermark,
       CASE WHEN e.route = 'exact' AND e.relation = 'inverse' THEN e.target_sharpness ELSE e.source_sharpness END AS photo_sharpness,
       row_number() OVER (
           PARTITION BY e.source_group_id, e.target_group_id, plain_words(e.text)
           ORDER BY e.rejected, CAST(e.width AS BIGINT) * e.height DESC, e.source_sharpness DESC, e.row_id
       ) AS copy
FROM edit_records e
WHERE e.route IN ('exact', 'composite', 'model') AND e.base_image_id IN (SELECT image_id FROM provenance WHERE list_contains($sources, source))

-- @rule not_rejected allow=any
NOT rejected

-- @rule unique_triplet allow=pass_all
copy = 1

-- @rule not_in_benchmark when=benchmarks allow=pass_all
benchmark IS NULL

-- @rule large_enough margin allow=pass_all
least(width, height) - $min_side_px

-- @rule sharp margin allow=pass_all
photo_sharpness - $min_photo_sharpness

-- @rule something_changed margin allow=pass_all
edited_fraction - $min_edited_fraction

-- @rule edit_matches_instruction allow=pass_all
route <> 'exact' OR matches

-- @rule passes_triplet_rules allow=pass_all
route = 'exact' OR triplet_verdict = 'pass'


-- @rule no_nudity margin when=max_nsfw allow=any
$max_nsfw - nsfw

-- @rule no_large_faces margin when=max_face_fraction allow=any
$max_face_fraction - face_fraction

-- @rule no_watermark margin when=max_watermark allow=any
$max_watermark - watermark

-- @quota
SELECT t.row_id, t.level1, t.level2, r.reward AS score FROM edit_types t JOIN edit_records r ON r.row_id = t.row_id
