"""What a person sees of an evaluation: a few lines, the pictures, report.html."""

from pathlib import Path

from common.config import as_yaml
from common.files import read_text
from common.logbook import read_metrics
from common.report import Section, write_report
from em_segmentation.config import Config
from em_segmentation.figures import draw_learning_curve, draw_thresholds
from em_segmentation.judging import Verdict
from em_segmentation.judging_instances import Figures
from em_segmentation.overlays import Shown, draw_errors, draw_overlay
from em_segmentation.truths import image_of, instance_truth, semantic_truth
from em_segmentation.volumes import Annotated


def summary(verdict: Verdict, config: Config) -> str:
    """The few lines that matter."""
    figures, lines = verdict.figures, []
    if "semantic" in config.targets.names:
        chosen = (
            f", decoding.class_threshold={told('semantic_threshold', figures)}"
            if "semantic_threshold" in figures
            else ""
        )
        for name in config.targets.semantic_names:
            lines.append(
                f"test {name} Jaccard {figures[f'{name}_jaccard']:.3f} ({interval(figures, f'{name}_jaccard', config)}, "
                f"n = {figures[f'{name}_pieces']} pieces of {counted(figures['test_volumes'], 'volume')}), "
                f"Dice {figures[f'{name}_dice']:.3f}{chosen}"
            )
            lines.append(f"  baseline {figures[f'baseline_{name}_jaccard']:.3f}: {figures[f'baseline_{name}']}")
            lines.append(f"  chance {figures[f'chance_{name}_jaccard']:.3f}: everything is {name}")
    if config.decoding.target != "none" and not figures["num_true_objects"]:
        lines.append(
            f"test instances: no true object to judge on; {counted(figures['num_objects'], 'false one')} found"
        )
    elif config.decoding.target != "none":
        threshold = (
            "" if config.decoding.method == "mutex" else f", decoding.threshold={told('instance_threshold', figures)}"
        )
        lines += [
            f"test adapted Rand error {figures['adapted_rand_error']:.3f} ({interval(figures, 'adapted_rand_error', config)}, "
            f"n = {figures['instance_pieces']} pieces), V_rand {figures['v_rand']:.3f}{threshold}",
            f"  VOI split {figures['voi_split']:.3f} + merge {figures['voi_merge']:.3f} bits; "
            f"{figures['num_objects']} objects for {figures['num_true_objects']} true ones",
            f"  baseline {figures['baseline_adapted_rand_error']:.3f}, VOI {figures['baseline_voi_split']:.3f} + "
            f"{figures['baseline_voi_merge']:.3f}: {figures['baseline_instances']}",
            f"  chance {figures['chance_adapted_rand_error']:.3f}: everything is one object",
        ]
    return "\n".join(lines)


def told(name: str, figures: Figures) -> str:
    """A threshold as the constant that it was, and where it comes from."""
    where = "chosen on validation" if figures["validation_volumes"] else "of the config"
    return f"{figures[name]} ({where})"


def counted(number: float | int | str, what: str) -> str:
    """1 volume, 2 volumes."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def interval(figures: Figures, name: str, config: Config) -> str:
    return f"{config.evaluation.confidence:.0%} interval {figures[f'{name}_low']:.3f} to {figures[f'{name}_high']:.3f}"


def write_pages(verdict: Verdict, volumes: list[Annotated], config: Config, folder: Path) -> None:
    """Pictures of a run's test volumes, and its report.html."""
    pictures = folder / "figures"
    sections = [result_section(verdict.figures, config)]
    shown = shown_of(verdict, volumes[0], config)
    if shown.found_classes is not None or shown.found_ids is not None:
        draw_overlay(shown, pictures / "overlay.png")
        text = "A found object has the colour of the true one that it shares most voxels with; grey ones share none."
        title = "First test volume: image, truth, found, in three planes"
        sections.append(Section(title, text if shown.found_ids is not None else "", [], pictures / "overlay.png", ""))
    if shown.found_ids is not None:
        draw_errors(shown, pictures / "errors.png")
        text = (
            "Merged: the found object here belongs mainly to another true one. Cut off: the true object here was found "
            "mainly as another one, or not at all. Black lines part the true objects; shares are of their voxels."
        )
        sections.append(Section("Splits and merges", text, [], pictures / "errors.png", ""))
    if verdict.curves:
        draw_thresholds(verdict.curves, pictures / "thresholds.png")
        sections.append(Section("How thresholds were chosen", "", [], pictures / "thresholds.png", ""))
    if (folder / "metrics.csv").exists():
        curve = pictures / "learning_curve.png"
        draw_learning_curve(read_metrics(folder / "metrics.csv", ("step", "train_loss")), curve)
        sections.append(Section("Learning curve", "", [], curve, ""))
    sections.append(figures_section(verdict.figures, config))
    sections.append(Section("Config", "", [], None, as_yaml(config)))
    if (folder / "environment.json").exists():
        sections.append(Section("Environment", "", [], None, read_text(folder / "environment.json")))
    write_report(folder / "report.html", f"em_segmentation: {folder.name}", sections)


def result_section(figures: Figures, config: Config) -> Section:
    """The table for whoever reads nothing else: each result with its interval, what simple methods give, and chance."""
    rows = [["", "test", f"{config.evaluation.confidence:.0%} interval", "simple method", "chance", "better is"]]
    text = []
    if "semantic" in config.targets.names:
        for name in config.targets.semantic_names:
            key = f"{name}_jaccard"
            rows.append([f"{name}: Jaccard index", *row_of(figures, key, f"baseline_{key}", f"chance_{key}"), "higher"])
        text.append(
            "Jaccard index: of the voxels that are found or true, the share that is both; simple method: Otsu's threshold of "
            "the raw image; chance: all of it."
        )
    if config.decoding.target != "none" and figures["num_true_objects"]:
        key = "adapted_rand_error"
        rows.append(["objects: adapted Rand error", *row_of(figures, key, f"baseline_{key}", f"chance_{key}"), "lower"])
        ours, simple = (
            float(figures[f"{kind}voi_split"]) + float(figures[f"{kind}voi_merge"]) for kind in ("", "baseline_")
        )
        rows.append(["objects: variation of information, bits", f"{ours:.3f}", "", f"{simple:.3f}", "", "lower"])
        text.append(
            "Adapted Rand error: 1 - F1 of the pairs of voxels that belong together; variation of information: what splits "
            f"and merges cost; simple method: {figures['baseline_instances']}; chance: one object."
        )
    text.append(
        f"Measured on {counted(figures['test_volumes'], 'test volume')}; "
        + (
            f"thresholds were chosen on {counted(figures['validation_volumes'], 'validation volume')}."
            if figures["validation_volumes"]
            else "there are no validation volumes: thresholds are those of the config, the weights the last."
        )
        + " Intervals: bootstrap over pieces of the test volumes, which are not fully independent of each other."
    )
    return Section("Result", " ".join(text), rows, None, "")


def row_of(figures: Figures, name: str, baseline: str, chance: str) -> list[str]:
    """A figure, its interval, the baseline's and chance's."""
    low, high = figures[f"{name}_low"], figures[f"{name}_high"]
    return [f"{figures[name]:.3f}", f"{low:.3f} to {high:.3f}", f"{figures[baseline]:.3f}", f"{figures[chance]:.3f}"]


def figures_section(figures: Figures, config: Config) -> Section:
    """All figures of results/metrics.json but those of the table of results."""
    results = [f"{name}_jaccard" for name in config.targets.semantic_names] + ["adapted_rand_error"]
    shown = {
        text for name in results for text in (name, f"{name}_low", f"{name}_high", f"baseline_{name}", f"chance_{name}")
    }
    rows = [["figure", "value"]] + [
        [name.replace("_", " "), f"{value:.4g}" if isinstance(value, float) else str(value)]
        for name, value in figures.items()
        if name not in shown
    ]
    return Section("Other figures", "", rows, None, "")


def shown_of(verdict: Verdict, volume: Annotated, config: Config) -> Shown:
    """The first test volume for the pictures."""
    return Shown(
        image_of(volume),
        volume.voxel_size_nm,
        config.targets.semantic_names,
        semantic_truth(volume, config) if verdict.classes is not None else None,
        verdict.classes,
        instance_truth(volume, config).ids if verdict.instances is not None else None,
        verdict.instances,
        volume.sections[0],
    )
