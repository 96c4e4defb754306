"""For teaching: the studies, the page, the export and the paper's own figures, each run as `python -m course.NAME`."""
