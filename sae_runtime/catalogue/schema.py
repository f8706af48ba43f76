"""The SQLite files of a catalogue: `features.sqlite`, and `labels.sqlite` of what people and models wrote.

`features.sqlite` lies in the folder of a published dictionary. It is written once, and read by any number of processes.
Labels of people and models are in a file of their own, which can lie elsewhere, so that a catalogue may be read-only
and can be made again without losing them.

Numbers of fixed count are blobs of little-endian arrays. Pieces (the bytes of tokens) are stored once, in `piece`, so
that no tokenizer is needed to show a page. A context's tokens are uint32 ids of pieces, its activations uint8 in 255
steps of its largest one; one that is above 0 is at least one step.
"""

from __future__ import annotations

CATALOGUE_FILE = "features.sqlite"
SCHEMA_VERSION = 1
"""PRAGMA user_version of both files."""
APPLICATION_ID = 0x5AE5EA7E
"""PRAGMA application_id, which tells a catalogue from any other SQLite file."""
PAGE_BYTES = 8192
"""Of SQLite's pages, in a catalogue: contexts of one feature lie on few of them."""

TABLES = """
CREATE TABLE metadata (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;  -- fields of CatalogueInfo as JSON
CREATE TABLE piece (id INTEGER PRIMARY KEY, bytes BLOB NOT NULL UNIQUE);
CREATE TABLE source (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE document (
    source INTEGER NOT NULL, record INTEGER NOT NULL, kind TEXT NOT NULL, language TEXT NOT NULL,
    PRIMARY KEY (source, record)
) WITHOUT ROWID;
CREATE TABLE feature (
    feature INTEGER PRIMARY KEY,
    label TEXT NOT NULL, label_source TEXT NOT NULL, label_f1 REAL,  -- the best one, empty if there is none
    firing_rate REAL NOT NULL, document_rate REAL NOT NULL, n_firings INTEGER NOT NULL,
    max_activation REAL NOT NULL, mean_active REAL NOT NULL,
    token_r2 REAL, position_correlation REAL NOT NULL,
    flags INTEGER NOT NULL,            -- bit i is FLAGS[i]
    top_tokens BLOB NOT NULL,          -- uint32 ids of pieces
    histogram BLOB NOT NULL,           -- uint32
    rate_by_position BLOB NOT NULL,    -- float32
    rate_by_kind TEXT NOT NULL, rate_by_language TEXT NOT NULL,  -- JSON objects
    ablation_kl REAL, output_score REAL
);
CREATE TABLE feature_token (
    feature INTEGER NOT NULL, list TEXT NOT NULL, rank INTEGER NOT NULL,  -- list: active, promoted, suppressed
    token INTEGER NOT NULL, piece INTEGER NOT NULL, value REAL NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (feature, list, rank)
) WITHOUT ROWID;
CREATE TABLE neighbor (
    feature INTEGER NOT NULL, rank INTEGER NOT NULL,
    how TEXT NOT NULL, dictionary TEXT NOT NULL, other INTEGER NOT NULL, score REAL NOT NULL,
    PRIMARY KEY (feature, rank)
) WITHOUT ROWID;
CREATE TABLE context (
    feature INTEGER NOT NULL, rank INTEGER NOT NULL, kind TEXT NOT NULL, quantile INTEGER NOT NULL,
    source INTEGER NOT NULL, record INTEGER NOT NULL, position INTEGER NOT NULL, character INTEGER NOT NULL,
    peak INTEGER NOT NULL, pieces BLOB NOT NULL, scale REAL NOT NULL, activations BLOB NOT NULL,
    PRIMARY KEY (feature, rank)
) WITHOUT ROWID;
CREATE TABLE label (
    feature INTEGER NOT NULL, rank INTEGER NOT NULL, source TEXT NOT NULL, text TEXT NOT NULL,
    f1 REAL, precision REAL, recall REAL, n_positive INTEGER NOT NULL, n_negative INTEGER NOT NULL,
    predicate TEXT NOT NULL, author TEXT NOT NULL, created TEXT NOT NULL,
    PRIMARY KEY (feature, rank)
) WITHOUT ROWID;
CREATE VIRTUAL TABLE search USING fts5 (label, tokens, content='', tokenize='unicode61');
CREATE VIRTUAL TABLE search_context USING fts5 (text, content='', tokenize='unicode61');
"""
"""`rank` counts from 0 in the order of a page. The rowid of both tables for searches is the feature. Contexts have one
of their own, since common words occur in those of most features: they are searched only where the other has too few."""

INDEXES = """
CREATE INDEX figures ON feature (
    feature, flags, firing_rate, label_f1, max_activation, token_r2, ablation_kl, output_score, n_firings
);
CREATE INDEX feature_by_piece ON feature_token (piece, count) WHERE list <> 'suppressed';
"""
"""Made when all rows are there, which is faster. `figures` has all that lists are sorted and filtered by: reading it
takes a fraction of the time that the rows would take, which are wide."""

LABELS_FILE = "labels.sqlite"
LABELS_APPLICATION_ID = 0x5AE51ABE
LABEL_TABLES = """
CREATE TABLE IF NOT EXISTS label (
    id INTEGER PRIMARY KEY, fingerprint TEXT NOT NULL, dictionary TEXT NOT NULL,
    feature INTEGER NOT NULL, source TEXT NOT NULL, text TEXT NOT NULL,
    f1 REAL, precision REAL, recall REAL, n_positive INTEGER NOT NULL, n_negative INTEGER NOT NULL,
    author TEXT NOT NULL, created TEXT NOT NULL,
    UNIQUE (fingerprint, feature, source)
);
CREATE VIRTUAL TABLE IF NOT EXISTS search USING fts5 (text, content='label', content_rowid='id', tokenize='unicode61');
CREATE TRIGGER IF NOT EXISTS label_added AFTER INSERT ON label BEGIN
    INSERT INTO search (rowid, text) VALUES (new.id, new.text);
END;
CREATE TRIGGER IF NOT EXISTS label_removed AFTER DELETE ON label BEGIN
    INSERT INTO search (search, rowid, text) VALUES ('delete', old.id, old.text);
END;
"""
"""A label belongs to the fingerprint of a dictionary, so that one file can hold those of several.
IF NOT EXISTS, because two processes may make the file at once."""

SEARCH_WEIGHTS = (10.0, 4.0, 1.0)
"""BM25 weights of label, tokens and contexts."""
