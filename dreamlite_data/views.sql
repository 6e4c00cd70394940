-- Views for people and for the policies. Every statement ends with a semicolon at the end of its line.
-- None of them reads image bytes.

CREATE OR REPLACE VIEW current_versions AS
SELECT name, arg_max(op_version, position) AS op_version FROM operator_versions GROUP BY name;

CREATE OR REPLACE VIEW current_ingest AS
SELECT * FROM op_ingest WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'ingest');

CREATE OR REPLACE VIEW current_quality AS
SELECT * FROM op_quality WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'quality');

CREATE OR REPLACE VIEW current_duplicates AS
SELECT * FROM op_duplicates WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'duplicates');

CREATE OR REPLACE VIEW current_semantic AS
SELECT * FROM op_semantic WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'semantic');

CREATE OR REPLACE VIEW current_contamination AS
SELECT * FROM op_contamination WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'contamination');

-- What the data shares with benchmarks, one row per image, caption or triplet that meets one.
CREATE OR REPLACE VIEW contamination AS
SELECT benchmark, entry, kind, distance, subject_id FROM current_contamination WHERE benchmark IS NOT NULL;

CREATE OR REPLACE VIEW current_caption AS
SELECT * FROM op_caption WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'caption');

CREATE OR REPLACE VIEW current_verify_caption AS
SELECT * FROM op_verify_caption WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'verify_caption');

CREATE OR REPLACE VIEW current_verify_edit AS
SELECT * FROM op_verify_edit WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'verify_edit');

CREATE OR REPLACE VIEW current_verify_triplet AS
SELECT * FROM op_verify_triplet WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'verify_triplet');

-- What the rules read of each triplet's pixels; `absent` names what could not be measured.
CREATE OR REPLACE VIEW current_triplet_measures AS
SELECT * FROM op_triplet_measures WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'verify_edit');

CREATE OR REPLACE VIEW current_edit_similarity AS
SELECT * FROM op_edit_similarity WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'edit_similarity');

CREATE OR REPLACE VIEW current_edit_question AS
SELECT * FROM op_edit_question WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'edit_question');

-- Triplets that our own routes made, by the current version of each: exact operators, compositing, models, pairs.
CREATE OR REPLACE VIEW made_edits AS
SELECT edit_id, min(name) AS operator, arg_min(subject_id, name) AS subject_id
FROM (
    SELECT unnest(o.edit_ids) AS edit_id, o.subject_id, v.name
    FROM op_edit o JOIN current_versions v ON v.op_version = o.op_version
)
GROUP BY edit_id;

CREATE OR REPLACE VIEW current_scores AS
SELECT s.* FROM scores s JOIN current_versions v ON v.op_version = s.op_version AND v.name = 'score_' || s.task;

-- Every current score, by the task's reward (scorer 'reward') and by further scorers (by their kind).
CREATE OR REPLACE VIEW scorer_scores AS
SELECT s.*, CASE WHEN v.name = 'score_' || s.task THEN 'reward' ELSE substr(v.name, length('score_' || s.task) + 2) END AS scorer
FROM scores s JOIN current_versions v ON v.op_version = s.op_version AND starts_with(v.name, 'score_' || s.task);

CREATE OR REPLACE VIEW current_safety AS
SELECT * FROM op_safety WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'safety');

CREATE OR REPLACE VIEW current_text AS
SELECT * FROM op_text WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'text');

CREATE OR REPLACE VIEW current_embed AS
SELECT * FROM op_embed WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'embed');

CREATE OR REPLACE VIEW current_similarity AS
SELECT * FROM op_similarity WHERE op_version = (SELECT op_version FROM current_versions WHERE name = 'similarity');

-- One row per image, captioner and style.
CREATE OR REPLACE VIEW current_describe AS
SELECT d.* FROM op_describe d SEMI JOIN current_versions v ON v.op_version = d.op_version AND starts_with(v.name, 'describe_');

-- Every caption of an image that a training step may see, with the probability of its being drawn: SANA's rule, as in
-- operators/caption_draw.py. A caption of which the small world's verifier knows that it is wrong takes no part.
CREATE OR REPLACE MACRO caption_choices_at(threshold, temperature) AS TABLE
WITH offered AS (
    SELECT caption_id FROM current_ingest WHERE error IS NULL
    UNION SELECT caption_id FROM current_caption
    UNION SELECT caption_id FROM current_describe
),
choices AS (
    SELECT c.image_id, c.caption_id, c.style, c.captioner, c.text, s.clip_score,
           coalesce(s.clip_score >= threshold AND s.clip_score > 0, false) AS passes
    FROM captions c
    SEMI JOIN offered o ON o.caption_id = c.caption_id
    LEFT JOIN current_similarity s ON s.subject_id = c.caption_id
    LEFT JOIN current_verify_caption v ON v.subject_id = c.caption_id
    WHERE NOT coalesce(v.in_language AND NOT v.matches, false)
),
weighed AS (
    SELECT *,
           CASE WHEN passes THEN pow(CAST(clip_score AS DOUBLE) / max(CAST(clip_score AS DOUBLE)) OVER of_image, 1.0 / temperature) ELSE 0.0 END AS weight,
           bool_or(passes) OVER of_image AS any_passes,
           row_number() OVER (PARTITION BY image_id ORDER BY clip_score DESC NULLS LAST, style <> 'provider', caption_id) AS place
    FROM choices
    WINDOW of_image AS (PARTITION BY image_id)
)
SELECT image_id, caption_id, style, captioner, text, clip_score,
       CASE WHEN any_passes THEN weight / sum(weight) OVER (PARTITION BY image_id) ELSE CAST(place = 1 AS DOUBLE) END AS probability
FROM weighed;

CREATE OR REPLACE VIEW caption_choices AS SELECT * FROM caption_choices_at(25.0, 0.1);

-- Groups of more than one image. The keeper has the most pixels, then the sharpest edges, then the lowest id; policies follow
-- the same order, and among equal images the lowest row.
CREATE OR REPLACE VIEW duplicates AS
SELECT d.subject_id AS image_id, d.group_id, d.kind, d.distance,
       row_number() OVER (
           PARTITION BY d.group_id ORDER BY CAST(i.width AS BIGINT) * i.height DESC, q.sharpness DESC, d.subject_id
       ) = 1 AS keeper
FROM current_duplicates d
LEFT JOIN images i ON i.image_id = d.subject_id
LEFT JOIN current_quality q ON q.subject_id = d.subject_id
WHERE d.group_id IN (SELECT group_id FROM current_duplicates GROUP BY group_id HAVING count(*) > 1);

-- Words without case, punctuation and spacing: what is left is what two captions or instructions are compared by.
CREATE OR REPLACE MACRO plain_words(words) AS trim(regexp_replace(lower(nfc_normalize(words)), '[^\p{L}\p{N}]+', ' ', 'g'));

-- One row per caption that a record offers: the provider's own, the scene reader's where the provider's is absent or wrong, and
-- where neither has words the best of those that captioners wrote (by similarity; where that is not measured, the medium one).
CREATE OR REPLACE VIEW t2i_records AS
WITH described AS (
    SELECT d.subject_id AS image_id,
           first(d.caption_id ORDER BY s.similarity DESC NULLS LAST, list_position(['medium', 'short', 'dense', 'tag'], d.style), d.caption_id)
               AS caption_id
    FROM current_describe d LEFT JOIN current_similarity s ON s.subject_id = d.caption_id
    WHERE d.caption_id IS NOT NULL
    GROUP BY d.subject_id
),
offered AS (
    SELECT subject_id AS row_id, subject_id AS record_id, 'provider' AS style, caption_id, source, domain, shard, source_key, image_id,
           notes, error
    FROM current_ingest WHERE task = 'generate'
    UNION ALL
    SELECT r.subject_id || '#scene', r.subject_id, 'scene', k.caption_id, r.source, r.domain, r.shard, r.source_key, r.image_id,
           r.notes, r.error
    FROM current_ingest r
    JOIN current_caption k ON k.subject_id = r.image_id AND k.caption_id IS NOT NULL
    LEFT JOIN current_verify_caption v ON v.subject_id = r.caption_id
    WHERE r.task = 'generate' AND NOT coalesce(v.matches, false)
    UNION ALL
    SELECT r.subject_id || '#described', r.subject_id, 'described', d.caption_id, r.source, r.domain, r.shard, r.source_key, r.image_id,
           r.notes, r.error
    FROM current_ingest r
    JOIN described d ON d.image_id = r.image_id
    ANTI JOIN (SELECT subject_id FROM current_caption WHERE caption_id IS NOT NULL) k ON k.subject_id = r.image_id
    WHERE r.task = 'generate' AND r.caption_id IS NULL
)
SELECT o.row_id, o.record_id, o.style, o.caption_id, o.source, o.domain, o.shard, o.source_key, o.image_id, o.notes, o.error,
       c.text, i.width, i.height, i.mime,
       q.sharpness, q.brightness, q.contrast, q.entropy_bits, q.colourfulness, q.clipped_fraction,
       coalesce(d.group_id, o.image_id) AS group_id,
       v.in_language, v.matches, v.reason,
       coalesce(x.benchmark, y.benchmark) AS benchmark,
       s.mu AS reward, s.log_sigma AS reward_log_sigma,
       m.similarity, f.nsfw, f.nsfw_label, f.faces, f.face_fraction, f.watermark, w.text_fraction
FROM offered o
LEFT JOIN images i ON i.image_id = o.image_id
LEFT JOIN captions c ON c.caption_id = o.caption_id
LEFT JOIN current_quality q ON q.subject_id = o.image_id
LEFT JOIN current_duplicates d ON d.subject_id = o.image_id
LEFT JOIN current_verify_caption v ON v.subject_id = o.caption_id
LEFT JOIN current_scores s ON s.subject_id = o.caption_id AND s.task = 'generate'
LEFT JOIN current_similarity m ON m.subject_id = o.caption_id
LEFT JOIN current_safety f ON f.subject_id = o.image_id
LEFT JOIN current_text w ON w.subject_id = o.image_id
LEFT JOIN contamination x ON x.subject_id = o.image_id
LEFT JOIN contamination y ON y.subject_id = o.caption_id;

-- One row per edit triplet: those that sources bring, and those that our routes made. base_image_id is the picture that it all began
-- with: whatever was made from one base lands in one split. A pair of the small world belongs to the source of its parent.
CREATE OR REPLACE VIEW edit_records AS
WITH first_records AS (
    SELECT edit_id, arg_min(source, subject_id) AS source, arg_min(domain, subject_id) AS domain
    FROM current_ingest WHERE task = 'edit' AND edit_id IS NOT NULL GROUP BY edit_id
),
offered AS (
    SELECT r.subject_id AS row_id, r.edit_id, r.source, r.domain, r.shard, r.source_key, r.notes, r.error, e.source_image_id AS base_image_id
    FROM current_ingest r LEFT JOIN edits e ON e.edit_id = r.edit_id
    WHERE r.task = 'edit'
    UNION ALL
    SELECT m.edit_id, m.edit_id, coalesce(f.source, e.route), coalesce(f.domain, 'photos'), NULL, m.edit_id, NULL, NULL,
           coalesce(p.source_image_id, m.subject_id)
    FROM made_edits m
    JOIN edits e ON e.edit_id = m.edit_id
    LEFT JOIN edits p ON m.operator = 'edit_pairs' AND p.edit_id = e.parent_edit_id
    LEFT JOIN first_records f ON f.edit_id = p.edit_id
    WHERE m.operator <> 'edit_pairs' OR f.edit_id IS NOT NULL
)
SELECT o.row_id, o.edit_id, o.source, o.domain, o.shard, o.source_key, o.notes, o.error, o.base_image_id,
       e.source_image_id, e.target_image_id AS image_id, e.instruction AS text, e.edit_type, e.route, e.parent_edit_id,
       coalesce(e.relation, '') AS relation, coalesce(e.rejected, false) AS rejected, e.reject_reason,
       i.width, i.height, a.sharpness AS source_sharpness, b.sharpness AS target_sharpness,
       coalesce(d.group_id, o.base_image_id) AS group_id,
       coalesce(ds.group_id, e.source_image_id) AS source_group_id, coalesce(dt.group_id, e.target_image_id) AS target_group_id,
       a.pixel_hash AS source_pixels, b.pixel_hash AS target_pixels,
       coalesce(x.benchmark, y.benchmark, z.benchmark) AS benchmark,
       v.in_language, v.matches, v.edited_fraction, v.outside_fraction, v.edit_mask, v.reason,
       t.rule AS triplet_rule, t.verdict AS triplet_verdict, t.failed AS triplet_failed, t.not_evaluated AS triplet_not_evaluated,
       s.mu AS reward, s.log_sigma AS reward_log_sigma,
       -- The worse of both images; adding the other keeps it null where one of them was not measured.
       greatest(f.nsfw, g.nsfw) + 0 * (f.nsfw + g.nsfw) AS nsfw,
       greatest(f.face_fraction, g.face_fraction) + 0 * (f.face_fraction + g.face_fraction) AS face_fraction,
       greatest(f.watermark, g.watermark) + 0 * (f.watermark + g.watermark) AS watermark
FROM offered o
LEFT JOIN edits e ON e.edit_id = o.edit_id
LEFT JOIN images i ON i.image_id = e.target_image_id
LEFT JOIN current_quality a ON a.subject_id = e.source_image_id
LEFT JOIN current_quality b ON b.subject_id = e.target_image_id
LEFT JOIN current_duplicates d ON d.subject_id = o.base_image_id
LEFT JOIN current_duplicates ds ON ds.subject_id = e.source_image_id
LEFT JOIN current_duplicates dt ON dt.subject_id = e.target_image_id
LEFT JOIN current_verify_edit v ON v.subject_id = o.edit_id
LEFT JOIN current_verify_triplet t ON t.subject_id = o.edit_id
LEFT JOIN current_scores s ON s.subject_id = o.edit_id AND s.task = 'edit'
LEFT JOIN current_safety f ON f.subject_id = e.source_image_id
LEFT JOIN current_safety g ON g.subject_id = e.target_image_id
LEFT JOIN contamination x ON x.subject_id = e.target_image_id
LEFT JOIN contamination y ON y.subject_id = e.source_image_id
LEFT JOIN contamination z ON z.subject_id = o.edit_id;

-- An image's place among aspects (width to height, the nearest of nine by ratio) and sizes (the power of two under the root of its area).
CREATE OR REPLACE MACRO aspect_bucket(width, height) AS list_extract(
    ['1:2', '9:16', '2:3', '3:4', '1:1', '4:3', '3:2', '16:9', '2:1'],
    1 + len(list_filter(
        -- Between two neighbours stands the root of their product: there both are as far away.
        [sqrt(9.0 / 32), sqrt(3.0 / 8), sqrt(1.0 / 2), sqrt(3.0 / 4), sqrt(4.0 / 3), sqrt(2.0), sqrt(8.0 / 3), sqrt(32.0 / 9)],
        lambda border: CAST(width AS DOUBLE) / height >= border
    ))
);

CREATE OR REPLACE MACRO size_bucket(width, height) AS CAST(pow(2, floor(log2(sqrt(CAST(width AS DOUBLE) * height)))) AS INTEGER) || ' px';

-- Where each score stands among those of its scorer, source and bucket: captions by aspect and size of their image, triplets by edit
-- type. position 1 is the best; top_share is position / bucket_rows, so that `top_share <= q` holds for the floor(q n) best; z is in
-- standard deviations of the bucket (null where there is none). Scores compare within one scorer only. Equal scores go by subject_id.
CREATE OR REPLACE VIEW score_ranks AS
WITH sources AS (
    SELECT image_id, min(source) AS source FROM current_ingest WHERE task = 'generate' AND error IS NULL GROUP BY image_id
),
edit_sources AS (
    SELECT edit_id, min(source) AS source FROM current_ingest WHERE task = 'edit' AND error IS NULL GROUP BY edit_id
),
placed AS (
    SELECT s.subject_id, s.task, s.scorer, s.scorer_id, s.mu, s.log_sigma, s.follow_mu, s.quality_mu,
           r.source, aspect_bucket(i.width, i.height) || ' ' || size_bucket(i.width, i.height) AS bucket
    FROM scorer_scores s
    JOIN captions c ON c.caption_id = s.subject_id
    JOIN images i ON i.image_id = c.image_id
    LEFT JOIN sources r ON r.image_id = c.image_id
    WHERE s.task = 'generate' AND s.mu IS NOT NULL
    UNION ALL
    SELECT s.subject_id, s.task, s.scorer, s.scorer_id, s.mu, s.log_sigma, s.follow_mu, s.quality_mu,
           coalesce(r.source, p.source, e.route), coalesce(e.edit_type, 'unlabelled')
    FROM scorer_scores s
    JOIN edits e ON e.edit_id = s.subject_id
    LEFT JOIN edit_sources r ON r.edit_id = s.subject_id
    LEFT JOIN edit_sources p ON p.edit_id = e.parent_edit_id
    WHERE s.task = 'edit' AND s.mu IS NOT NULL
)
SELECT subject_id, task, scorer, scorer_id, source, bucket, mu, log_sigma, follow_mu, quality_mu,
       row_number() OVER ranked AS position, count(*) OVER whole AS bucket_rows,
       row_number() OVER ranked / count(*) OVER whole AS top_share,
       (mu - avg(mu) OVER whole) / nullif(stddev_samp(mu) OVER whole, 0) AS z
FROM placed
WINDOW whole AS (PARTITION BY task, scorer, source, bucket),
       ranked AS (PARTITION BY task, scorer, source, bucket ORDER BY mu DESC, subject_id);

-- The distribution of each scorer's scores per source and bucket.
CREATE OR REPLACE VIEW score_quantiles AS
SELECT task, scorer, source, bucket, count(*) AS n, avg(mu) AS mean, stddev_samp(mu) AS deviation,
       quantile_cont(mu, 0.05) AS p05, quantile_cont(mu, 0.10) AS p10, quantile_cont(mu, 0.25) AS p25, quantile_cont(mu, 0.50) AS p50,
       quantile_cont(mu, 0.75) AS p75, quantile_cont(mu, 0.90) AS p90, quantile_cont(mu, 0.95) AS p95
FROM score_ranks
GROUP BY task, scorer, source, bucket
ORDER BY task, scorer, source, bucket;

-- For people: what the lake holds, without the rows that never became an image.
CREATE OR REPLACE VIEW samples AS SELECT * FROM t2i_records WHERE error IS NULL;

CREATE OR REPLACE VIEW triplets AS SELECT * FROM edit_records WHERE error IS NULL;

CREATE OR REPLACE VIEW latest_datasets AS
SELECT * FROM datasets d WHERE version = (SELECT max(version) FROM datasets x WHERE x.name = d.name);

-- Where each triplet was first published: the data set that its provider names, else the source, else our own route.
CREATE OR REPLACE VIEW edit_origins AS
SELECT r.edit_id, min(coalesce(p.origin, r.source, r.route)) AS origin
FROM edit_records r
LEFT JOIN (SELECT record_id, min(origin) AS origin FROM provenance WHERE role = 'target' GROUP BY record_id) p ON p.record_id = r.row_id
WHERE r.error IS NULL
GROUP BY r.edit_id;

-- Each triplet's place in the taxonomy. A label means what its origin says, else what it means anywhere, else it is unmapped: such rows
-- stay and are counted.
CREATE OR REPLACE VIEW edit_types AS
WITH labelled AS (
    SELECT t.row_id, t.edit_id, t.source, o.origin, t.route, t.edit_type, t.rejected,
           trim(regexp_replace(lower(coalesce(t.edit_type, '')), '[^a-z0-9]+', '_', 'g'), '_') AS label,
           trim(regexp_replace(lower(o.origin), '[^a-z0-9]+', '_', 'g'), '_') AS place
    FROM triplets t LEFT JOIN edit_origins o ON o.edit_id = t.edit_id
),
pairs AS (SELECT DISTINCT place, label FROM labelled),
named AS (
    SELECT p.place, p.label, arg_max(t.level1, length(t.origin)) AS level1, arg_max(t.level2, length(t.origin)) AS level2
    FROM pairs p JOIN taxonomy t ON t.label = p.label AND t.origin <> 'any' AND starts_with(p.place, t.origin)
    GROUP BY p.place, p.label
)
SELECT l.row_id, l.edit_id, l.source, l.origin, l.route, l.edit_type, l.rejected,
       coalesce(n.level1, g.level1, 'unmapped') AS level1, coalesce(n.level2, g.level2, 'unmapped') AS level2
FROM labelled l
LEFT JOIN named n ON n.place = l.place AND n.label = l.label
LEFT JOIN taxonomy g ON g.origin = 'any' AND g.label = l.label;

-- The published mix against what the newest dataset versions hold: `missing` rows would bring a category to its share of today's total.
CREATE OR REPLACE VIEW quota AS
WITH kept AS (
    SELECT DISTINCT r.row_id
    FROM dataset_rows r JOIN latest_datasets d ON d.name = r.name AND d.version = r.version
    WHERE r.task = 'edit'
),
counted AS (
    SELECT t.level1, count(*) AS n FROM edit_types t SEMI JOIN kept k ON k.row_id = t.row_id GROUP BY t.level1
),
total AS (SELECT coalesce(sum(n), 0) AS n FROM counted)
SELECT q.mix, q.category, any_value(q.share) AS wanted_share, CAST(coalesce(sum(c.n), 0) AS BIGINT) AS have,
       coalesce(sum(c.n), 0) / greatest(any_value(t.n), 1) AS have_share,
       CAST(greatest(0, ceil(any_value(q.share) * any_value(t.n)) - coalesce(sum(c.n), 0)) AS BIGINT) AS missing
FROM edit_quotas q LEFT JOIN counted c ON c.level1 = q.level1, total t
GROUP BY q.mix, q.category
UNION ALL
SELECT m.mix, 'unmapped', 0, CAST(c.n AS BIGINT), c.n / greatest(t.n, 1), 0
FROM (SELECT DISTINCT mix FROM edit_quotas) m, counted c, total t
WHERE c.level1 = 'unmapped'
ORDER BY mix, wanted_share DESC, category;

-- How far the rules of verification were evaluated: a rule that waits for measures shows here and never passes in silence.
CREATE OR REPLACE VIEW rule_coverage AS
SELECT rule, count(*) AS triplets, count(*) FILTER (WHERE verdict = 'pass') AS passed, count(*) FILTER (WHERE verdict = 'fail') AS failed,
       count(*) FILTER (WHERE verdict = 'not_evaluated') AS undecided, count(*) FILTER (WHERE len(not_evaluated) > 0) AS partly_evaluated,
       list_sort(list_distinct(flatten(list(not_evaluated)))) AS not_evaluated
FROM current_verify_triplet
WHERE error IS NULL
GROUP BY rule
ORDER BY rule;

-- The same per condition: how often one was not evaluated, and how often it failed.
CREATE OR REPLACE VIEW condition_coverage AS
WITH judged AS (SELECT rule, failed, not_evaluated FROM current_verify_triplet WHERE error IS NULL),
named AS (
    SELECT rule, unnest(not_evaluated) AS measure, 'not_evaluated' AS outcome FROM judged
    UNION ALL SELECT rule, split_part(unnest(failed), ' ', 1), 'failed' FROM judged
)
SELECT n.rule, n.measure, count(*) FILTER (WHERE outcome = 'not_evaluated') AS not_evaluated,
       count(*) FILTER (WHERE outcome = 'failed') AS failed, (SELECT count(*) FROM judged j WHERE j.rule = n.rule) AS triplets
FROM named n
GROUP BY n.rule, n.measure
ORDER BY n.rule, n.measure;

-- Rows into and out of each rule, in the order of the policy, for the newest version of each dataset.
CREATE OR REPLACE VIEW funnel AS
WITH counted AS (
    SELECT dataset, version, coalesce(rule_position, 2147483647) AS position, count(*) AS n
    FROM decisions GROUP BY ALL
),
rejected AS (
    SELECT r.dataset, r.version, r.position, r.rule, coalesce(c.n, 0) AS rejected,
           (SELECT coalesce(sum(n), 0) FROM counted x WHERE x.dataset = r.dataset AND x.version = r.version) AS total
    FROM policy_rules r
    JOIN latest_datasets d ON d.name = r.dataset AND d.version = r.version
    LEFT JOIN counted c ON c.dataset = r.dataset AND c.version = r.version AND c.position = r.position
)
SELECT dataset, version, position, rule,
       CAST(total - sum(rejected) OVER w + rejected AS BIGINT) AS rows_in,
       CAST(rejected AS BIGINT) AS rejected,
       CAST(total - sum(rejected) OVER w AS BIGINT) AS rows_out
FROM rejected
WINDOW w AS (PARTITION BY dataset, version ORDER BY position)
ORDER BY dataset, position;

CREATE OR REPLACE VIEW why_dropped AS
SELECT d.dataset, d.version, d.row_id, d.image_id, d.first_rule AS rule, d.margin, d.failed
FROM decisions d
JOIN latest_datasets l ON l.name = d.dataset AND l.version = d.version
WHERE d.verdict = 'drop';

-- What became of the answers from one stage to a later one of the same run. All stages answer the same questions from the same noise, so
-- the change of each is known, and its interval (95 %) is narrower than those of two rates. Several pictures of a question count as one.
-- Of exact answers it is the one of Agresti and Min (Statistics in Medicine 24, 2005), which stays wide where no answer changed.
CREATE OR REPLACE VIEW eval_changes AS
WITH owned AS (
    SELECT run_id, step, started_at, coalesce(json_extract_string(outputs_json, '$.done_by'), run_id) AS owner
    FROM steps WHERE starts_with(step, 'evaluate_')
),
answered AS (
    SELECT o.run_id, (o.started_at, a.stage <> 'export_fp32', a.stage) AS turn, a.stage, a.task, a.question_id, a.repetition, a.exact, a.reward
    FROM eval_answers a
    JOIN owned o ON o.owner = a.run_id AND o.step = 'evaluate_' || CASE WHEN starts_with(a.stage, 'export_') THEN 'export' ELSE a.stage END
),
compared AS (
    SELECT a.run_id, b.stage AS before, a.stage, a.task, a.question_id, any_value(b.turn) AS before_turn, any_value(a.turn) AS turn,
           count(*) AS pictures, count(*) FILTER (WHERE a.exact AND NOT b.exact) AS mended,
           count(*) FILTER (WHERE b.exact AND NOT a.exact) AS broken, (mended - broken) / pictures AS exact, avg(a.reward - b.reward) AS reward
    FROM answered b
    JOIN answered a ON a.run_id = b.run_id AND a.task = b.task AND a.question_id = b.question_id AND a.repetition = b.repetition AND a.turn > b.turn
    GROUP BY ALL
),
counted AS (
    SELECT run_id, before, stage, task, any_value(before_turn) AS before_turn, any_value(turn) AS turn, count(*) AS questions,
           CAST(sum(pictures) AS BIGINT) AS pictures, CAST(sum(mended) AS BIGINT) AS mended, CAST(sum(broken) AS BIGINT) AS broken,
           avg(exact) AS exact_change, sum(exact) / (questions + 2) AS exact_centre, sum(exact * exact) AS exact_squares,
           avg(reward) AS reward_change, 1.96 * stddev_samp(reward) / sqrt(count(reward)) AS reward_half
    FROM compared GROUP BY run_id, before, stage, task
),
spread AS (
    SELECT *, 1.96 * sqrt(((exact_squares + 1) / (questions + 2) - exact_centre * exact_centre) / (questions + 2)) AS exact_half FROM counted
)
SELECT run_id, before, stage, task, questions, pictures, mended, broken, exact_change, exact_centre - exact_half AS exact_low,
       exact_centre + exact_half AS exact_high, reward_change, reward_change - reward_half AS reward_low, reward_change + reward_half AS reward_high
FROM spread
ORDER BY run_id, turn, before_turn, task;

-- Everything that `start` came from, down to the images: SELECT * FROM lineage_of('<artifact id>').
CREATE OR REPLACE MACRO lineage_of(start) AS TABLE
WITH RECURSIVE walk(kind, id, depth) AS (
    SELECT DISTINCT child_kind, child_id, 0 FROM lineage WHERE child_id = start
    UNION
    SELECT l.parent_kind, l.parent_id, w.depth + 1 FROM walk w JOIN lineage l ON l.child_kind = w.kind AND l.child_id = w.id
    WHERE w.depth < 64
),
nodes AS (
    SELECT kind, id, min(depth) AS depth FROM walk GROUP BY kind, id
    UNION
    SELECT 'dataset', name || '@' || version, 0 FROM datasets WHERE name || '@' || version = start
)
SELECT kind, id, depth, NULL AS role, NULL AS via FROM nodes
UNION ALL
SELECT 'image', r.image_id, n.depth + 1, 'target', n.id
FROM nodes n JOIN dataset_rows r ON n.kind = 'dataset' AND n.id = r.name || '@' || r.version
UNION ALL
SELECT 'image', r.source_image_id, n.depth + 1, 'source', n.id
FROM nodes n JOIN dataset_rows r ON n.kind = 'dataset' AND n.id = r.name || '@' || r.version
WHERE r.source_image_id IS NOT NULL;

-- Edits that follow each other, as providers of multi-turn sets bring them.
CREATE OR REPLACE VIEW sessions AS
SELECT e.session_id, e.turn, e.edit_id, e.source_image_id, e.target_image_id, e.instruction, e.edit_type
FROM edits e
WHERE e.session_id IS NOT NULL AND e.edit_id IN (SELECT edit_id FROM current_ingest)
ORDER BY e.session_id, e.turn;

-- The cut-outs in the pictures of each composite, with where they are from and their licence as stated.
CREATE OR REPLACE VIEW edit_cutouts AS
SELECT p.edit_id, p.cutout_id, c.name, c.origin, c.licence, c.url
FROM (SELECT edit_id, unnest(cutout_ids) AS cutout_id FROM edit_parts) p
LEFT JOIN cutouts c ON c.cutout_id = p.cutout_id;
