from matplotlib.image import imread

from train.runs import curves
from train.runs.log import Logs


def test_curves_are_drawn_from_the_metrics(tmp_path):
    with Logs(tmp_path, first_step=0, total_steps=20) as logs:
        for step, loss in ((10, 2.0), (20, float("nan")), (30, 1.0)):
            logs.results(step, step, {split: {"loss": loss, "accuracy": 0.5} for split in ("train", "test")})
    curves.draw(tmp_path)
    picture = imread(tmp_path / "curves.png")
    assert picture.shape[0] > 300 and picture.shape[1] > 800
    assert (picture[..., :3] < 0.5).any(-1).sum() > 1000  # lines and letters, not a blank page


def test_run_without_metrics_has_no_picture(tmp_path):
    curves.draw(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_run_may_have_any_name(tmp_path):
    run_dir = tmp_path / "$a^$ = 1"
    run_dir.mkdir()
    with Logs(run_dir, first_step=0, total_steps=20) as logs:
        logs.results(10, 1.0, {"test": {"loss": 1.0, "accuracy": 0.5}})
    curves.draw(run_dir)
    assert (run_dir / "curves.png").exists()
