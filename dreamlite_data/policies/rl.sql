-- Prompts for reinforcement: a draw from both tasks, each prompt once. The images stay with the rows for comparison.

-- @candidates
SELECT row_id, task, image_id, source_image_id, text, edit_type, edited_fraction, edit_mask, weight, split,
       row_number() OVER (PARTITION BY task, text, source_image_id ORDER BY row_id) AS copy,
       row_number() OVER (PARTITION BY task ORDER BY md5(row_id || $seed), row_id) AS draw
FROM dataset_rows
WHERE (name = 't2i' AND version = $t2i_version) OR (name = 'edit' AND version = $edit_version)

-- @rule distinct_prompt allow=pass_all
copy = 1

-- @rule drawn margin allow=pass_all
$rl_rows_per_task - draw
