"""`demo`: tries candidates, remembers the fastest accurate one, and re-checks it as calls go on."""
