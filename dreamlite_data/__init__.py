"""Rows in, rows out: sources, measurements, policies and the versioned lake. Knows nothing of training or orchestration."""
