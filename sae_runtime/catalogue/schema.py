"""The SQLite files of a catalogue: `features.sqlite`, and `labels.sqlite` of what people and models wrote.

`features.sqlite` lies in the folder of a published dictionary. It is written once, and read by any number of processes.
Labels of people and models are in a file of their own, which can lie elsewhere, so that a catalogue may be read-only
and can be made again without losing them.

Numbers of fixed count are blobs of little-endian arrays. A context's tokens are uint32 ids, its activations uint8 in
255 steps of its largest one. The pieces of all tokens that occur are in `token`, so that no tokenizer is needed to
show a page.
"""

from __future__ import annotations

CATALOGUE_FILE = "features.sqlite"
SCHEMA_VERSION = 1
APPLICATION_ID = 0x5AE5EA7E
"""PRAGMA application_id, which tells a catalogue from any other SQLite file."""

TABLES = """
CREATE TABLE metadata (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;  -- values are JSON
CREATE TABLE token (id INTEGER PRIMARY KEY, piece BLOB NOT NULL);
CREATE TABLE source (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE);
CREATE TABLE document (
    id INTEGER PRIMARY KEY, source INTEGER NOT NULL, record INTEGER NOT NULL, kind TEXT NOT NULL, language TEXT NOT NULL
);
CREATE TABLE feature (
    feature INTEGER PRIMARY KEY,
    firing_rate REAL NOT NULL, document_rate REAL NOT NULL, n_firings INTEGER NOT NULL,
    max_activation REAL NOT NULL, mean_active REAL NOT NULL,
    token_r2 REAL, position_correlation REAL NOT NULL,
    flags INTEGER NOT NULL,            -- bit i is FLAGS[i]
    histogram BLOB NOT NULL,           -- uint32
    rate_by_position BLOB NOT NULL,    -- float32
    rate_by_kind TEXT NOT NULL, rate_by_language TEXT NOT NULL,  -- JSON objects
    ablation_kl REAL, output_score REAL
);
CREATE TABLE feature_token (
    feature INTEGER NOT NULL, list TEXT NOT NULL, rank INTEGER NOT NULL,  -- list: active, promoted, suppressed
    token INTEGER NOT NULL, value REAL NOT NULL, count INTEGER NOT NULL,
    PRIMARY KEY (feature, list, rank)
) WITHOUT ROWID;
CREATE TABLE neighbor (
    feature INTEGER NOT NULL, how TEXT NOT NULL, rank INTEGER NOT NULL,
    dictionary TEXT NOT NULL, other INTEGER NOT NULL, score REAL NOT NULL,
    PRIMARY KEY (feature, how, rank)
) WITHOUT ROWID;
CREATE TABLE context (
    feature INTEGER NOT NULL, kind TEXT NOT NULL, quantile INTEGER NOT NULL, rank INTEGER NOT NULL,
    document INTEGER NOT NULL, position INTEGER NOT NULL, character INTEGER NOT NULL,
    peak INTEGER NOT NULL, tokens BLOB NOT NULL, scale REAL NOT NULL, activations BLOB NOT NULL,
    PRIMARY KEY (feature, kind, quantile, rank)
) WITHOUT ROWID;
CREATE TABLE label (
    feature INTEGER NOT NULL, source TEXT NOT NULL, text TEXT NOT NULL,
    f1 REAL, precision REAL, recall REAL, n_positive INTEGER NOT NULL, n_negative INTEGER NOT NULL,
    predicate TEXT NOT NULL, author TEXT NOT NULL, created TEXT NOT NULL,
    PRIMARY KEY (feature, source)
) WITHOUT ROWID;
CREATE INDEX feature_by_rate ON feature (firing_rate);
CREATE VIRTUAL TABLE search USING fts5 (label, tokens, contexts, content='', tokenize='unicode61');
"""
"""The rowid of `search` is the feature; `label` holds the labels of rules."""

LABELS_FILE = "labels.sqlite"
LABEL_TABLES = """
CREATE TABLE metadata (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE label (
    id INTEGER PRIMARY KEY, feature INTEGER NOT NULL, source TEXT NOT NULL, text TEXT NOT NULL,
    f1 REAL, precision REAL, recall REAL, n_positive INTEGER NOT NULL, n_negative INTEGER NOT NULL,
    author TEXT NOT NULL, created TEXT NOT NULL,
    UNIQUE (feature, source)
);
CREATE VIRTUAL TABLE search USING fts5 (text, content='label', content_rowid='id', tokenize='unicode61');
"""

SEARCH_WEIGHTS = (10.0, 4.0, 1.0)
"""BM25 weights of label, tokens and contexts."""
