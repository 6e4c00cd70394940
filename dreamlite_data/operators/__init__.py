"""Operators measure: they read rows and add columns, and never drop a row."""
