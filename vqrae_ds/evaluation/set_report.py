"""The numbers of a set as a page of Markdown, tokens and compression beside every figure."""

from __future__ import annotations

from typing import Any, NamedTuple


class Meaning(NamedTuple):
    """How a figure is shown, and which way is better, or what it is where nothing has changed."""

    title: str
    better: str
    form: str


MEANINGS = {
    "psnr": Meaning("PSNR, dB", "higher", ".2f"),
    "baseline_psnr": Meaning("PSNR of the mean colour, dB", "", ".2f"),
    "ssim": Meaning("SSIM", "higher", ".4f"),
    "lpips": Meaning("LPIPS (VGG16)", "lower", ".4f"),
    "rfid": Meaning("rFID", "lower", ".3f"),
    "frechet_other_inception": Meaning("Frechet distance, no rFID", "lower", ".3f"),
    "cosine": Meaning("cosine of the tokens' features", "1", ".4f"),
    "l2": Meaning("squared distance of the features", "0", ".4g"),
    "knn_agreement": Meaning("agreement of neighbours", "1", ".4f"),
}
COST = ("tokens an image", "compression")  # beside every figure
FEW_FOR_FRECHET = 10_000


def as_markdown(report: dict[str, Any]) -> str:
    """The page. It names `page.png` and `report.json`, which lie beside it."""
    parts = [
        f"# {report['model']['folder']} on {report['data']['shards']}",
        _subject(report),
        "![best, median and worst](page.png)",
        _figures(report),
        _codebook(report),
        _retention(report),
        _classes(report),
        _left_out(report["left_out"]),
        _protocol(report["protocol"]),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def as_lines(report: dict[str, Any]) -> list[str]:
    """The means of the set, a line each, with what they cost."""
    rate, codebook = report["rate"], report["codebook"]
    cost = f"{rate['tokens_per_image']} tokens, {rate['compression_ratio']:.4g} times compressed"
    lines = []
    for name, value in (report["figures"] | report["retention"]).items():
        if name in MEANINGS:
            title, _, form = MEANINGS[name]
            lines.append(f"{title}: {_number(value, form)}  ({cost})")
    used = f"{codebook['usage']:.2%} of {codebook['num_codes']}"
    lines.append(f"codes in use: {used}, perplexity {codebook['perplexity']:.1f}  ({cost})")
    for whose in ("model", "original"):
        if whose in report["classes"]:
            accuracy = report["classes"][whose]["knn_accuracy"]
            lines.append(f"k-NN accuracy, features of the {whose}: {accuracy:.2%}  ({cost})")
            if (probe := report["classes"][whose].get("linear_probe")) is not None:
                accuracy = probe["accuracy"]
                lines.append(f"linear probe, features of the {whose}: {accuracy:.2%}  ({cost})")
    return lines + [f"left out: {name}: {why}" for name, why in report["left_out"].items()]


def _subject(report: dict[str, Any]) -> str:
    model, data, rate = report["model"], report["data"], report["rate"]
    lines = [
        f"{data['num_images']} images at {data['image_size']} x {data['image_size']} px; "
        f"{model['encoder']} in {model['dtype']}.",
        f"An image is {rate['tokens_per_image']} tokens of {rate['bits_per_token']:.4g} bits "
        f"({model['num_embeddings']} codes): {rate['bits_per_pixel']:.4g} bits a pixel, "
        f"{rate['compression_ratio']:.4g} times less than 24.",
    ]
    if data["num_left_out"]:
        lines.append(f"{data['num_left_out']} images could not be used and count nowhere.")
    if data["num_without_error"]:
        lines.append(f"{data['num_without_error']} images came back without any error.")
    return "\n".join(lines)


def _figures(report: dict[str, Any]) -> str:
    spread = report["spread"]
    head = ["figure", "mean", "5 %", "median", "95 %", "better", *COST]
    rows = []
    for name, value in report["figures"].items():
        title, better, form = MEANINGS[name]
        quantiles = [
            _number(spread[name][part], form) if name in spread else ""
            for part in ("p05", "median", "p95")
        ]
        rows.append([title, _number(value, form), *quantiles, better, *_cost(report)])
    page = "## Reconstruction\n\n" + _table(head, rows)
    if {"rfid", "frechet_other_inception"} & report["figures"].keys():
        number = report["data"]["num_images"]
        if number < FEW_FOR_FRECHET:
            page += (
                f"\n\nThe Frechet distance of {number} images is biased upwards: compare it only "
                "with one of as many images. Published rFIDs are of 50,000."
            )
        if "frechet_other_inception" in report["figures"]:
            page += (
                "\n\nThe weights of Inception are not the published ones, so the distance cannot "
                "be compared with any rFID."
            )
    return page


def _codebook(report: dict[str, Any]) -> str:
    codebook, rate = report["codebook"], report["rate"]
    rows = [
        [_uses(entry), str(entry["codes"]), f"{entry['codes'] / codebook['num_codes']:.1%}"]
        for entry in codebook["histogram"]
    ]
    return (
        f"## Codebook\n\n{codebook['usage']:.2%} of {codebook['num_codes']} codes are used by the "
        f"{codebook['num_tokens']} tokens of the set ({rate['tokens_per_image']} an image, "
        f"compression {rate['compression_ratio']:.4g}); perplexity {codebook['perplexity']:.1f}; "
        f"{codebook['dead_codes']} codes are never used.\n\n"
        + _table(["uses in the set", "codes", "share of the codes"], rows)
    )


def _retention(report: dict[str, Any]) -> str:
    retention = report["retention"]
    if not retention:
        return ""
    rows = []
    for name, (title, unchanged, form) in MEANINGS.items():
        if name in retention:
            rows.append([title, _number(retention[name], form), unchanged, *_cost(report)])
    head = ["of the features with the original encoder's", "mean", "unchanged", *COST]
    page = "## What is left of the original features\n\n" + _table(head, rows)
    if "knn_agreement" in retention:
        page += (
            f"\n\nNeighbours: {retention['knn_neighbours']} of {retention['knn_images']} images; "
            f"unrelated features would agree in {retention['knn_agreement_by_chance']:.3f}."
        )
    return page


def _classes(report: dict[str, Any]) -> str:
    classes = report["classes"]
    if not classes:
        return ""
    rows = []
    for whose in ("model", "original"):
        if whose not in classes:
            continue
        probe = classes[whose].get("linear_probe")
        shown = ["", "", ""]
        if probe is not None:
            shown = [f"{probe['accuracy']:.2%}", f"{probe['chance']:.2%}", str(probe["num_tested"])]
        rows.append([whose, f"{classes[whose]['knn_accuracy']:.2%}", *shown, *_cost(report)])
    head = ["features", "k-NN accuracy", "linear probe", "most frequent class", "images tested"]
    number = f"{classes['num_images']} images of {classes['num_classes']} classes."
    return f"## Classes\n\n{number}\n\n" + _table([*head, *COST], rows)


def _left_out(left_out: dict[str, str]) -> str:
    if not left_out:
        return ""
    return "## Left out\n\n" + "\n".join(f"* {name}: {why}" for name, why in left_out.items())


def _protocol(protocol: dict[str, str]) -> str:
    lines = "\n".join(f"* {name}: {what}" for name, what in protocol.items())
    return f"## Protocol\n\n{lines}"


def _cost(report: dict[str, Any]) -> list[str]:
    """What stands in the columns `COST`."""
    rate = report["rate"]
    return [str(rate["tokens_per_image"]), f"{rate['compression_ratio']:.4g}"]


def _uses(entry: dict[str, int]) -> str:
    low, high = entry["uses_from"], entry["uses_to"]
    return str(low) if low == high else f"{low} to {high}"


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(_row(cells) for cells in (head, ["---"] * len(head), *rows))


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
