"""Whether the running statistics of a run are those of its data: `python -m train diagnose`."""

from jbn.inspection import Diagnosis
from train.studies import charts
from train.studies.sections.section import Section, capitalized, listed, number

LOSSES = {
    "running": "with the running statistics",
    "batch": "with each batch's own",
    "recalibrated": "with those of all batches",
}
MOST = 20  # rows


def section(found: Diagnosis) -> Section:
    """Show the verdict, the losses, and the layers, the worst first."""
    verdict = [f"{capitalized(f.kind)}: {f.what} {f.remedy}" for f in found.findings]
    verdict = verdict or ["Nothing is wrong with the running statistics."]
    shown = [
        charts.chart(
            found.draw_layers,
            alt="Divergence of the population from the running moments, by layer",
            caption="How far the statistics of the data are from the running ones, by layer, in nats; points "
            "are features. Above the line a typical feature's mean is off by a third of its deviation.",
        )
    ]
    losses = ()
    if found.losses is not None:
        means = found.losses.means()
        losses = (f"The loss is {listed(f'{number(means[key])} {said}' for key, said in LOSSES.items())}.",)
        shown.append(
            charts.chart(
                found.draw_losses,
                alt="Loss by statistics",
                caption="The loss by the statistics that the network normalizes with.",
            )
        )
    rows = found.rows(MOST)
    left_out = len(found.layers) - len(rows)
    more = (f"Of {len(found.layers)} layers the worst {MOST} are listed.",) * (left_out > 0)
    header = ("layer", "KL, nats", "worst features", "constant", "remarks")
    return Section("Running statistics", (*verdict, *losses, *more), tuple(shown), header, tuple(rows))
