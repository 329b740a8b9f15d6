"""The written report: a document of findings, tables and charts, made from measured rows."""
