"""InterventionService, one file a call: what becomes of text while features are edited, and what features do."""
