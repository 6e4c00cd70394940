-- Edit triplets whose target shows what the instruction asks for, and nothing else changed.

-- @candidates
SELECT row_id, 'edit' AS task, image_id, source_image_id, text, edit_type, edited_fraction, edit_mask, CAST(1 AS FLOAT) AS weight,
       group_id, error, benchmark, width, height, source_sharpness, target_sharpness, in_language, matches, outside_fraction,
       rejected, triplet_verdict, nsfw, face_fraction, watermark,
       row_number() OVER (
           PARTITION BY coalesce(source_group_id, row_id), coalesce(target_group_id, row_id), plain_words(text)
           ORDER BY CAST(width AS BIGINT) * height DESC, least(source_sharpness, target_sharpness) DESC, row_id
       ) AS copy
FROM edit_records
WHERE list_contains($sources, source)

-- @rule ingested
error IS NULL

-- @rule not_rejected allow=any
NOT rejected

-- @rule unique_triplet
copy = 1

-- @rule not_in_benchmark when=benchmarks allow=pass_all
benchmark IS NULL

-- @rule large_enough margin allow=pass_all
least(width, height) - $min_side_px

-- @rule sharp margin
least(source_sharpness, target_sharpness) - $min_sharpness

-- @rule something_changed margin
edited_fraction - $min_edited_fraction

-- @rule in_instruction_language when=require_scene_language allow=pass_all
in_language

-- @rule change_is_local margin when=require_scene_language allow=pass_all
$max_outside_fraction - outside_fraction

-- @rule edit_matches_instruction when=require_scene_language allow=pass_all
matches

-- @rule passes_triplet_rules when=require_triplet_rules allow=pass_all
triplet_verdict = 'pass'

-- @rule no_nudity margin when=max_nsfw allow=any
$max_nsfw - nsfw

-- @rule no_large_faces margin when=max_face_fraction allow=any
$max_face_fraction - face_fraction

-- @rule no_watermark margin when=max_watermark allow=any
$max_watermark - watermark

-- @quota
SELECT t.row_id, t.level1, t.level2, r.reward AS score FROM edit_types t JOIN edit_records r ON r.row_id = t.row_id
