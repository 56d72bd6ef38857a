"""What the program says of how it is used."""

USAGE = """\
usage: python -m train CONFIG.toml [--key value ...]     train; resumes where there is a checkpoint
       python -m train CONFIG.toml --help                the keys, with this file's values
       python -m train eval RUN_DIR [--data.path PATH]   evaluate the best checkpoint; prints one JSON line
       python -m train predict RUN_DIR IMAGES ...        classes and probabilities, one JSON line an image
       python -m train export RUN_DIR [FILE]             the best checkpoint as a program that needs jax alone
       python -m train compare BASELINE.toml OTHER.toml ... [--out DIR] [--seeds N] [--key value ...]
                                                         train all; comparison.json, and report.html
       python -m train sweep CONFIG.toml --key A,B ...   train each combination; results.json, report.html
       python -m train list                              the configs, a line each
"""

HELP = {
    "compare": """\
usage: python -m train compare BASELINE.toml OTHER.toml ... [--out DIR] [--seeds N] [--key value ...]

Trains each job in DIR/NAME, and compares them with the first one: how many times fewer steps each takes to
the best test accuracy of the baseline. Writes DIR/comparison.json and DIR/report.html, a page with pictures.
The same line again goes on where it was stopped; what is finished is not trained again.

  --out DIR       where all of it goes; runs/BASELINE-comparison if not given
  --seeds N       trains each job with its seed and the N - 1 after it, those in DIR/NAME,seed=SEED
  --key value     any key of a config, for every job: `python -m train CONFIG.toml --help` lists them
  --inspect True  measures what the layers see and how smooth the loss is; the page then shows it
""",
    "sweep": """\
usage: python -m train sweep CONFIG.toml --key A,B ... [--out DIR]

Trains every combination of the values, in DIR/KEY=VALUE,KEY=VALUE. Writes DIR/results.json and
DIR/report.html, a page with pictures. The same line again goes on where it was stopped; what is finished is
not trained again.

  --key A,B       any key of a config, with several values or one; lists are words: --model.widths 64,64 32
  --seed 0,1,2    several seeds; the page shows medians and ranges
  --out DIR       where all of it goes; runs/CONFIG-sweep if not given: another one for another sweep
""",
}
