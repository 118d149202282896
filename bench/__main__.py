"""`python -m bench`."""

from bench.cli import app

if __name__ == "__main__":  # a study's worker process imports this file under another name
    app(prog_name="mrcnn-bench")
