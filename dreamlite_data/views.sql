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

CREATE OR REPLACE VIEW current_scores AS
SELECT s.* FROM scores s JOIN current_versions v ON v.op_version = s.op_version AND v.name = 'score_' || s.task;

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

-- One row per caption that a record offers: the provider's own, and the captioner's where the provider's is absent or wrong.
CREATE OR REPLACE VIEW t2i_records AS
WITH offered AS (
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
)
SELECT o.row_id, o.record_id, o.style, o.caption_id, o.source, o.domain, o.shard, o.source_key, o.image_id, o.notes, o.error,
       c.text, i.width, i.height, i.mime,
       q.sharpness, q.brightness, q.contrast, q.entropy_bits, q.colourfulness, q.clipped_fraction,
       coalesce(d.group_id, o.image_id) AS group_id,
       v.in_language, v.matches, v.reason,
       coalesce(x.benchmark, y.benchmark) AS benchmark,
       s.mu AS reward, s.log_sigma AS reward_log_sigma
FROM offered o
LEFT JOIN images i ON i.image_id = o.image_id
LEFT JOIN captions c ON c.caption_id = o.caption_id
LEFT JOIN current_quality q ON q.subject_id = o.image_id
LEFT JOIN current_duplicates d ON d.subject_id = o.image_id
LEFT JOIN current_verify_caption v ON v.subject_id = o.caption_id
LEFT JOIN contamination x ON x.subject_id = o.image_id
LEFT JOIN contamination y ON y.subject_id = o.caption_id
LEFT JOIN current_scores s ON s.subject_id = o.caption_id AND s.task = 'generate';

-- One row per edit triplet: those that sources bring, and those that exact operators made from photos.
CREATE OR REPLACE VIEW edit_records AS
WITH offered AS (
    SELECT subject_id AS row_id, edit_id, source, domain, shard, source_key, notes, error FROM current_ingest WHERE task = 'edit'
    UNION ALL
    SELECT edit_id, edit_id, 'exact', 'photos', NULL, edit_id, NULL, NULL
    FROM edits
    WHERE route = 'exact' AND op_version = (SELECT op_version FROM current_versions WHERE name = 'edit')
)
SELECT o.row_id, o.edit_id, o.source, o.domain, o.shard, o.source_key, o.notes, o.error,
       e.source_image_id, e.target_image_id AS image_id, e.instruction AS text, e.edit_type, e.route, e.parent_edit_id,
       i.width, i.height, a.sharpness AS source_sharpness, b.sharpness AS target_sharpness,
       coalesce(d.group_id, e.source_image_id) AS group_id, coalesce(t.group_id, e.target_image_id) AS target_group_id, a.pixel_hash AS source_pixels, b.pixel_hash AS target_pixels,
       v.in_language, v.matches, v.edited_fraction, v.outside_fraction, v.edit_mask, v.reason,
       coalesce(x.benchmark, y.benchmark, z.benchmark) AS benchmark,
       s.mu AS reward, s.log_sigma AS reward_log_sigma
FROM offered o
LEFT JOIN edits e ON e.edit_id = o.edit_id
LEFT JOIN images i ON i.image_id = e.target_image_id
LEFT JOIN current_quality a ON a.subject_id = e.source_image_id
LEFT JOIN current_quality b ON b.subject_id = e.target_image_id
LEFT JOIN current_duplicates d ON d.subject_id = e.source_image_id
LEFT JOIN current_duplicates t ON t.subject_id = e.target_image_id
LEFT JOIN current_verify_edit v ON v.subject_id = o.edit_id
LEFT JOIN contamination x ON x.subject_id = e.target_image_id
LEFT JOIN contamination y ON y.subject_id = e.source_image_id
LEFT JOIN contamination z ON z.subject_id = o.edit_id
LEFT JOIN current_scores s ON s.subject_id = o.edit_id AND s.task = 'edit';

-- For people: what the lake holds, without the rows that never became an image.
CREATE OR REPLACE VIEW samples AS SELECT * FROM t2i_records WHERE error IS NULL;

CREATE OR REPLACE VIEW triplets AS SELECT * FROM edit_records WHERE error IS NULL;

CREATE OR REPLACE VIEW latest_datasets AS
SELECT * FROM datasets d WHERE version = (SELECT max(version) FROM datasets x WHERE x.name = d.name);

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
