"""The paper's figures, redrawn from run folders: `python -m eval.figures FIG RUN...`."""
