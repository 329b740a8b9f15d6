"""The written report: measured rows in, a document of findings, tables and charts out."""
