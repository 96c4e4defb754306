"""For teaching: exercises and graders, the world, studies, pages, export; run as `python -m course.NAME`."""
