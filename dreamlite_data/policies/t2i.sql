-- Text to image: one row per verified caption. Where the provider's caption is missing or wrong, the captioner's stands in.

-- @candidates
SELECT row_id, 'generate' AS task, image_id, CAST(NULL AS VARCHAR) AS source_image_id, text, CAST(NULL AS VARCHAR) AS edit_type,
       CAST(NULL AS FLOAT) AS edited_fraction, CAST(NULL AS BLOB) AS edit_mask, CAST(1 AS FLOAT) AS weight, group_id,
       error, benchmark, width, height, sharpness, in_language, matches,
       similarity, nsfw, face_fraction, watermark, text_fraction,
       row_number() OVER (
           PARTITION BY coalesce(group_id, row_id), style
           ORDER BY text IS NULL, CAST(width AS BIGINT) * height DESC, sharpness DESC, row_id
       ) AS copy
FROM t2i_records
WHERE list_contains($sources, source)

-- @rule ingested
error IS NULL

-- @rule unique_image
copy = 1

-- @rule not_in_benchmark when=benchmarks allow=pass_all
benchmark IS NULL

-- @rule large_enough margin allow=pass_all
least(width, height) - $min_side_px

-- @rule sharp margin
sharpness - $min_sharpness

-- @rule has_caption allow=pass_all
text IS NOT NULL

-- @rule in_caption_language when=require_scene_language allow=pass_all
in_language

-- @rule caption_matches_image when=require_scene_language
matches

-- @rule words_fit_image margin when=min_similarity allow=any
similarity - $min_similarity

-- @rule no_nudity margin when=max_nsfw allow=any
$max_nsfw - nsfw

-- @rule no_large_faces margin when=max_face_fraction allow=any
$max_face_fraction - face_fraction

-- @rule no_watermark margin when=max_watermark allow=any
$max_watermark - watermark

-- @rule little_text margin when=max_text_fraction allow=any
$max_text_fraction - text_fraction
