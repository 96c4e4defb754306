"""For teaching: the world, studies, pages, reranking, export, the paper's figures, run as `python -m course.NAME`."""
