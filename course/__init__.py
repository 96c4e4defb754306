"""For teaching: a look at the world, studies, pages, reranking, export, the paper's figures: `python -m course.NAME`."""
