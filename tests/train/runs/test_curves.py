from matplotlib.image import imread

from train.runs.curves import draw  # before a fixture takes it away
from train.runs.log import Log


def test_curves_are_drawn_from_the_metrics_of_a_run_of_any_name(tmp_path):
    run_dir = tmp_path / "$a^$ = 1"
    run_dir.mkdir()
    draw(run_dir)
    assert list(run_dir.iterdir()) == []  # without metrics no picture
    with Log(run_dir, first_step=0, total_steps=20) as log:
        for step, loss in ((10, 2.0), (20, float("nan")), (30, 1.0)):
            values = {"loss": loss, "accuracy": 0.5, "r2": None, "class_accuracy": {"a": 0.5, "b": None}}
            log.results(step, step, dict.fromkeys(("train", "test"), values))
    draw(run_dir)
    picture = imread(run_dir / "curves.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 800
    assert (picture[..., :3] < 0.5).any(-1).sum() > 1000  # lines and letters, not a blank page
