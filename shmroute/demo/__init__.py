"""The demonstration: a pager and four workers on one cache, on a real checkpoint, checked against a dense reference."""
