"""The page's sections as HTML, top to bottom. Every text that comes from a study's files is escaped here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from lowsearch import __version__
from lowsearch.report import tables
from lowsearch.report.study_files import Network, StudyFiles
from lowsearch.report.tables import Estimate, FamilyComparison, PredictionError, duration, milliseconds, percent, plus_minus
from lowsearch.search.objectives import OBJECTIVES, Metric

SOURCES = {
    "measured": "timed on the device itself, in fresh processes, as a whole network or as a single block",
    "table": "from a latency table that was measured elsewhere; the device is not attached here",
    "predicted": "from a fitted model, without this network's own training or measurement",
    "estimated": "worked out: accuracy from a training, or part of one, and from what the predictor expects; latency from a formula",
    "trained": "accuracy of weights that were trained here on the full schedule, with a fresh seed for the final networks",
    "published": "copied from a paper or model card",
    "proxy:params": "the logarithm of the parameters: a score (rank), no accuracy: it only orders networks",
    "proxy:macs": "the logarithm of the MACs: a score (rank), no accuracy: it only orders networks",
    "prior:published": "the trend of published accuracies of other networks: a score (rank), no accuracy: it only orders networks",
    "supernet": "learned from what networks score with the weights of a supernet: a score (rank), no accuracy: it only orders networks",
}
READING = (
    "Latency is the time of one forward pass at the stated batch; throughput and time per image follow from it. Peak memory and file size "
    "are worked out from the architecture, not measured. The front is the set of networks that no other beats in all objectives. "
    "In stage tables ×4 is an expansion and g2 means two groups; Lowtention ÷2 runs at half the resolution, c0.5 at half the channels. "
    "Errors of differences treat networks as independent; they were read on the same test images, so the true errors are somewhat smaller."
)
PHASES = {"profile": "profile the device", "calibrate": "calibrate", "search": "search", "finals": "train and re-measure the front"}
SHAPES = {
    "measured": '<circle cx="6" cy="6" r="5" fill="currentColor"/>',
    "table": '<rect x="1" y="1" width="10" height="10" fill="currentColor"/>',
    "predicted": '<circle cx="6" cy="6" r="4.6" fill="none" stroke="currentColor" stroke-width="1.4"/>',
    "estimated": '<path d="M6 1 11 6 6 11 1 6Z" fill="none" stroke="currentColor" stroke-width="1.4"/>',
}
"""The markers of `figures.SHAPES`, for the legend under the plot."""


def body(study: StudyFiles) -> str:
    """Everything between <body> and the scripts."""
    sections = (_key_figures, _front, _further, _sharing, _family, _background, _networks, _next_steps, _reading)
    inside = "\n".join(html for html in (section(study) for section in sections) if html)
    written = f"Written by lowsearch {escape(__version__)} from the files of study {escape(study.name)}."
    return f"""{_header(study)}
<main>
{inside}
</main>
<footer>{written} This page is self-contained and loads nothing from the network.</footer>"""


# ---- header: what was searched, under which circumstances, and where the time went


def _header(study: StudyFiles) -> str:
    words = {name: objective.word for name, objective in OBJECTIVES.items()}
    if source := tables.stand_in(study):
        stand_in = tables.STAND_INS[source]
        words["acc"] = f"{words.get(stand_in, stand_in)} (in place of accuracy)"
    objectives = [words.get(name, name) for name in str(study.settings.get("objective", "")).split("-")]
    lead = (
        f"Networks from the space <b>{escape(_setting(study, 'space'))}</b> searched for {escape(' and '.join(objectives))}"
        f" on {_devices_in_words(study)}."
    )
    return f"""<header class="top">
<div class="titlebar"><div><p class="eyebrow">lowsearch study</p><h1>{escape(study.name)}</h1></div>
<button type="button" class="quiet" id="theme">Dark theme</button></div>
<p class="lead">{lead}</p>
{_progress_notice(study)}{_stale_notice(study)}{_steering_notice(study)}{_end_notice(study)}
<dl class="facts">{"".join(_fact(*fact) for fact in facts(study))}</dl>
{_spent(study)}
<noscript><p class="notice">The plots and the network panel need JavaScript; the tables do not.</p></noscript>
</header>"""


def facts(study: StudyFiles) -> list[tuple[str, str, str]]:
    """The study's circumstances as (word, value, detail); those that study.yaml does not hold are left out."""
    get = study.settings.get
    size, images, versions, threads = get("space_size"), get("images") or {}, get("versions") or {}, get("threads")
    others = [f"{name} {version}" for name, version in versions.items() if name != "lowsearch"]
    rows = [
        ("Device", _device(study), _setting(study, "device").replace(",", ", ") if get("device_name") else ""),
        ("Runtime", _joined(_setting(study, "runtime").replace(",", ", "), get("precision")), ""),
        ("Batch and threads", _joined(_with("batch ", get("batch")), _with("", threads, " thread" if threads == 1 else " threads")), ""),
        ("Search space", _setting(study, "space"), f"{size:.2g} networks" if isinstance(size, int | float) else ""),
        ("Data", _setting(study, "data"), ", ".join(f"{n:,} {split}" for split, n in images.items())),
        ("Objective", _setting(study, "objective"), ", ".join(map(str, get("limits") or ()))),
        ("Candidates", *_candidate_counts(study)),
        ("Sampler and seed", _joined(get("sampler"), _with("seed ", get("seed"))), _with("rungs ", get("rungs"))),
        ("Started", _setting(study, "created")[:16].replace("T", " "), ""),
        ("Versions", _with("lowsearch ", versions.get("lowsearch")), _joined(*others)),
    ]
    return [row for row in rows if row[1]]


def _candidate_counts(study: StudyFiles) -> tuple[str, str]:
    counts = tables.candidate_counts(study)
    if not study.candidates:
        return "", ""
    untrained = f"{counts['untrained']} refused before training" if counts["untrained"] else ""
    whence = _joined(f"{counts['proposed']} proposed", f"{counts['family']} hand-made", untrained)
    return f"{counts['family'] + counts['proposed']} scored", whence


def _setting(study: StudyFiles, name: str) -> str:
    value = study.settings.get(name)
    return "" if value is None else str(value)


def _device(study: StudyFiles) -> str:
    names = dict.fromkeys(str(device.get("device_name", "")) for device in study.settings.get("devices") or ())
    return ", ".join(filter(None, names)) or _setting(study, "device_name") or _setting(study, "device")


def _with(before: str, value: object, after: str = "") -> str:
    return "" if value is None else f"{before}{value}{after}"


def _devices_in_words(study: StudyFiles) -> str:
    """As markup: the device and its runtime, or those of several."""
    several = study.settings.get("devices") or [{"device": _device(study), "runtime": _setting(study, "runtime")}]
    words = [f"<b>{escape(str(d['device']))}</b> with <b>{escape(str(d.get('runtime', '')))}</b>" for d in several]
    return f"{', '.join(words[:-1])} and {words[-1]} together" if len(words) > 1 else words[0]


def _joined(*parts: object) -> str:
    return " · ".join(str(part) for part in parts if part not in (None, ""))


def _fact(word: str, value: str, detail: str) -> str:
    small = f"<small>{escape(detail)}</small>" if detail else ""
    return f"<div><dt>{escape(word)}</dt><dd>{escape(value)}{small}</dd></div>"


def _progress_notice(study: StudyFiles) -> str:
    if tables.finals_are_known(study):
        return ""
    scored = len(tables.scored_candidates(study))
    text = (
        f"This study is not finished: {scored} networks have a score so far, and the front has not had its final training and measurement."
    )
    if study.missing:
        text += f" Not there yet: {', '.join(study.missing)}."
    return f'<p class="notice">{escape(text)} <code>lowsearch run --study {escape(study.name)}</code> continues it.</p>'


def _stale_notice(study: StudyFiles) -> str:
    stale = (study.settings.get("latency_table") or {}).get("stale")
    if not stale:
        return ""
    text = (
        f"The latency table was stale, and used because --allow-stale was given: {'; '.join(map(str, stale))}. Predicted latencies are of"
        " then, measured ones of now."
    )
    return f'<p class="notice">{escape(text)}</p>'


def _steering_notice(study: StudyFiles) -> str:
    whys = filter(None, (study.summary.get(f"{signal}_ended") for signal in ("steering", "promotion")))
    return "".join(f'<p class="notice">In this study {escape(why)}.</p>' for why in whys)


def _end_notice(study: StudyFiles) -> str:
    why = [f"The search has ended early: {ended}" if (ended := study.summary.get("search_ended")) else ""]
    why += [study.summary.get(name) for name in ("none_kept", "broken_in_finals")]
    return "".join(f'<p class="notice">{escape(text[0].upper() + text[1:])}.</p>' for text in why if text)


def _spent(study: StudyFiles) -> str:
    spent = {phase: seconds for phase, seconds in tables.spent_seconds(study).items() if seconds > 0}
    if not spent:
        return ""
    bars = "".join(f'<i style="flex:{seconds:.3f}"></i>' for seconds in spent.values())
    items = [
        ("in all", duration(sum(spent.values()))),
        *((PHASES.get(phase, phase), duration(seconds)) for phase, seconds in spent.items()),
    ]
    budget = _setting(study, "budget")
    items += [("budget of the search", budget)] if budget else []
    lines = "".join(f"<li>{escape(word)} <b>{escape(value)}</b></li>" for word, value in items)
    return f'<div class="spent"><div class="track">{bars}</div><ul>{lines}</ul></div>'


# ---- key figures


@dataclass(frozen=True, slots=True)
class Card:
    """One key figure: a word, a number, what stands small beside it, and a line of explanation."""

    word: str
    value: str
    beside: str
    explanation: str


def key_figures(study: StudyFiles) -> list[Card]:
    """The first numbers of the page; none before the final training is done."""
    if not tables.finals_are_known(study):
        return []
    cards = [
        _front_card(study, tables.final_front(study)),
        _sharing_card(study),
        _hypervolume_card(study),
        *_comparison_cards(tables.against_family(study)),
        limit_card(study),
        trust_card(study),
    ]
    return [card for card in cards if card is not None]


def _key_figures(study: StudyFiles) -> str:
    def html(card: Card) -> str:
        beside = f" <small>{escape(card.beside)}</small>" if card.beside else ""
        value = f'<div class="value">{escape(card.value)}{beside}</div>'
        return f'<div class="card"><h3>{escape(card.word)}</h3>{value}<p>{escape(card.explanation)}</p></div>'

    cards = key_figures(study)
    return f'<div class="figures">{"".join(map(html, cards))}</div>' if cards else ""


def _front_card(study: StudyFiles, front: Sequence[Network]) -> Card:
    if not front:
        return Card("Points on the front", "0", "", "no network qualified")
    if len(tables.objectives(study)) == 1:
        return _best_card(study, front[0])
    accuracy = tables.comparable_accuracy(*front)
    values = sorted(accuracy(network) for network in front)
    on = "".join(f" on {label}" for label in list(tables.device_sources(study))[:1])
    spans = [f"{milliseconds(front[0].latency_ms)} to {milliseconds(front[-1].latency_ms)}{on}"]
    if all(map(math.isfinite, values)):
        spans.append(f"{percent(values[0])} to {percent(values[-1])} {accuracy.split} accuracy")
    return Card("Points on the front", str(len(front)), "", ", ".join(spans))


def _best_card(study: StudyFiles, best: Network) -> Card:
    """The one that a search for a single objective ends with."""
    [objective] = tables.objectives(study)
    others = [
        milliseconds(best.latency_ms, best.latency_std_ms),
        f"{tables.count(best.macs)} MACs",
        f"{tables.count(best.params)} parameters",
    ]
    if objective.metric != "accuracy":
        value = getattr(best, objective.metric)
        said = tables.count(value) if objective.metric in ("macs", "params") else tables.amount(value, objective.unit)
        return Card(f"Best {objective.word}", said, best.label, ", ".join(others))
    if tables.stand_in(study):
        return Card("Best score", f"{best.score:.4g}", best.label, ", ".join(others))
    accuracy = tables.comparable_accuracy(best)
    return Card(f"Best {accuracy.split} accuracy", percent(accuracy(best), best.accuracy_std), best.label, ", ".join(others))


def _sharing_card(study: StudyFiles) -> Card | None:
    """What one network for all devices costs; None where there is one device."""
    fronts = tables.shared_fronts(study)
    if not fronts:
        return None
    worst = fronts[0].worst
    how = f"slower than a network of its own, on the device that loses most: mean over the front; at most {_slower(max(worst))}"
    return Card("One network for all devices", _slower(tables.mean_ratio(worst)), "", how)


def _slower(ratio: float) -> str:
    return percent(ratio - 1, signed=True) if ratio >= 1.0005 else "–"


def _hypervolume_card(study: StudyFiles) -> Card | None:
    volumes = tables.hypervolumes(study)
    if volumes is None:
        return None
    change = percent(volumes.proposed / volumes.family - 1, signed=True) if volumes.family > 0 else ""
    against = f"of the proposed networks; {volumes.family:.3f} of the hand-made family, {volumes.where}"
    return Card("Hypervolume", f"{volumes.proposed:.3f}", change, against)


def _comparison_cards(comparisons: Sequence[FamilyComparison]) -> list[Card]:
    if not comparisons:
        return []
    gain, n_gain = tables.gain_at_equal_latency(comparisons)
    change, n_change = tables.change_at_equal_accuracy(comparisons)
    beaten = sum(comparison.beaten_by is not None for comparison in comparisons)
    family = f"of {len(comparisons)} hand-made networks"
    cards = []
    if n_gain:
        mean = f"mean over the {n_gain} {family} that a proposed one is at least as fast as"
        cards.append(Card("Accuracy at equal latency", percent(gain.value, signed=True).removesuffix(" %"), f"{_error(gain)} points", mean))
    if n_change:
        mean = f"mean over the {n_change} {family} that a proposed one is at least as accurate as"
        value = percent(change.value, signed=True).removesuffix(" %")
        cards.append(Card("Latency at equal accuracy", value, f"{_error(change)} %", mean))
    by = "by a network more than two standard errors better in both axes"
    return [*cards, Card("Hand-made networks beaten", str(beaten), f"of {len(comparisons)}", by)]


def _error(estimate: Estimate) -> str:
    return plus_minus(100 * estimate.std, 1).strip()


def _verified(study: StudyFiles) -> str:
    """How candidates near the limit fared that the search measured before training them; empty where it measured none."""
    found = study.summary.get("verified") or {"networks": 0}
    if not found["networks"]:
        return ""
    worst = f", the worst by {percent(found['worst_excess'])}" if found["over"] else ""
    return f"; measured before training, as they were near the limit: {found['networks']}, over it: {found['over']}{worst}"


def limit_card(study: StudyFiles) -> Card | None:
    """How the limit held on the device and how far predictions were off; None where nothing was measured."""
    limits, errors = tables.limits(study), tables.prediction_error(study)
    worst_off = f"worst {percent(errors.worst)}{_pace(study, errors)}"
    if limits.n_limited:
        side = f"{percent(abs(limits.worst_excess))} {'over' if limits.worst_excess > 0 else 'under'} {limits.limit_ms:g} ms"
        excess = (
            f"once measured; the slowest is {side}; measured latency is {percent(errors.median)} off its prediction (median), {worst_off}"
            f"{_verified(study)}"
        )
        return Card("Broke the latency limit", str(limits.n_broken), f"of {limits.n_limited}", excess)
    if errors.n_networks:
        median = f"median of {errors.n_networks} measured networks, {worst_off}"
        return Card("Latency off its prediction", percent(errors.median), "", median)
    return None


def trust_card(study: StudyFiles) -> Card | None:
    """How well the accuracy predictor ranks: on networks held out for it where `lowsearch trust` ran, else on those the study trained."""
    if study.trust:
        own = study.trust["signals"][0]
        how = f"on {own['n_networks']} held-out networks: {study.trust['reason']}{_in_band(study, '; ')}"
        return Card("Accuracy predictor", str(study.trust["verdict"]), _rank(own), how)
    if study.trust_band:
        return Card("Accuracy predictor", str(study.trust_band["verdict"]), "", f"{_in_band(study)}: {study.trust_band['reason']}")
    found, forecast = (study.summary.get(name) or {} for name in ("steering", "forecast"))
    if found.get("low") is None:  # Studies from before steering was judged by itself have the forecast alone.
        return _forecast_card(forecast)
    how = (
        f"Spearman of predictions by the architecture alone, which steer, over {found['n_networks']} fully trained networks, each left out"
    )
    how += f", {why}" if (why := study.summary.get("unjudged")) else ""
    if forecast.get("low") is not None:
        how += f"; of forecasts from the lowest rung, which promote, {forecast['spearman']:.2f}"
    how += "; not yet examined on networks that the search did not choose (lowsearch trust)"
    return Card("Predictions rank networks", f"{found['spearman']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}", how)


def _forecast_card(found: Mapping[str, Any]) -> Card | None:
    if found.get("low") is None:
        return None
    how = (
        f"Spearman from the lowest rung to the full schedule, over {found['n_networks']} networks that the search chose; "
        f"not yet examined on others (lowsearch trust)"
    )
    return Card("Forecasts rank networks", f"{found['spearman']:.2f}", f"{found['low']:.2f} to {found['high']:.2f}", how)


def _in_band(study: StudyFiles, before: str = "") -> str:
    if not study.trust_band:
        return ""
    own, within = study.trust_band["signals"][0], study.trust_band["within"]
    rank = _rank(own) or "no ranking"
    return f"{before}{rank} on {own['n_networks']} held-out networks of {within['low_ms']:.3g} to {within['high_ms']:.3g} ms"


def _rank(found: Mapping[str, Any]) -> str:
    if found.get("low") is None:
        return ""
    return f"Spearman {found['spearman']:.2f} ({found['low']:.2f} to {found['high']:.2f})"


def _pace(study: StudyFiles, errors: PredictionError) -> str:
    if not math.isfinite(study.pace):
        return ""
    change = f"{percent(abs(study.pace - 1))} {'slower' if study.pace > 1 else 'faster'}"
    return f"; the machine itself was {change} than when its table was measured, and {percent(errors.beyond_pace)} is left beyond that"


# ---- several devices


def _sharing(study: StudyFiles) -> str:
    """What one network for all devices costs, against one for each; empty where there is one device."""
    fronts = tables.shared_fronts(study)
    if not fronts:
        return ""
    sources = tables.device_sources(study)
    cards = "".join(
        f'<div class="card plotcard"><h3>{escape(device)}</h3><div class="plot small" id="device-{i}"></div></div>'
        for i, device in enumerate(sources)
    )
    note = (
        "How much slower networks are on each device than the fastest of all scored that is no worse in anything else (geometric mean over "
        "the front): the price of training one network for all. Latencies and scores are the search's estimates on both sides. About half "
        "of the proposals were for one device alone; a search for that device only could still find faster ones."
    )
    columns = [("Networks for", ""), ("Networks", "number"), *((f"On {escape(device)}", "number") for device in sources)]
    columns += [("On the device that loses most", "number"), ("At most", "number")]
    rows = "".join(_sharing_row(front) for front in fronts)
    shared = fronts[0]
    _, score = tables.plot_axes(study, "validation")
    heads = [("Network", ""), (escape(score.title), "number")]
    for device, source in sources.items():
        heads += [(f"{escape(device)}, {escape(source)}", "number"), ("Slower than its own", "number")]
    lines = "".join(_shared_row(study, shared, i, score) for i in range(len(shared.networks)))
    return f"""{_table_section("What sharing one network costs", note, _head(columns), rows)}
<section class="pair">{cards}</section>
{_table_section("The networks for all devices", "By the search's estimates; what was measured: Final networks.", _head(heads), lines)}"""


def _sharing_row(front: tables.SharedFront) -> str:
    whom = "all devices" if front.name == "shared" else f"{escape(front.name)} alone"
    means = [tables.mean_ratio(ratios) for ratios in front.regret.values()]
    numbers = [*means, tables.mean_ratio(front.worst), max(front.worst, default=math.nan)]
    cells = [_cell(f"<b>{whom}</b>" if front.name == "shared" else whom), _cell(str(len(front.networks)), "number")]
    return f"<tr>{''.join([*cells, *(_cell(_slower(number), 'number') for number in numbers)])}</tr>"


def _shared_row(study: StudyFiles, front: tables.SharedFront, i: int, score: tables.Axis) -> str:
    network = front.networks[i]
    cells = [_cell(_dotted(study, network)), _cell(tables.amount(score.value(network), ""), "number")]
    for device, ratios in front.regret.items():
        cells += [_cell(milliseconds(network.by_device[device]), "number"), _cell(_slower(ratios[i]), "number")]
    return f'<tr data-arch="{escape(network.arch_id)}">{"".join(cells)}</tr>'


# ---- the front, the family


def _front(study: StudyFiles) -> str:
    note = (
        _what_was_done(study) if tables.finals_are_known(study) else "Scores of the search so far; nothing here has had its final training."
    )
    switch = ""
    if tables.test_was_read(study):
        pressed = {"validation": "true", "test": "false"}
        buttons = [f'<button type="button" data-split="{s}" aria-pressed="{p}">{s.capitalize()}</button>' for s, p in pressed.items()]
        switch = f'<div class="switch" role="group" aria-label="Accuracy on">{"".join(buttons)}</div>'
    used = _latency_sources(study)
    shapes = [f'<li><svg viewBox="0 0 12 12" aria-hidden="true">{shape}</svg>latency {s}</li>' for s, shape in SHAPES.items() if s in used]
    x, y = tables.plot_axes(study, "validation")
    title = "The best network" if len(tables.objectives(study)) == 1 else "The front"
    if (x.title, y.title) == ("Latency, ms", "Validation accuracy, %"):
        title = "Accuracy against latency"
    if further := tables.further_metrics(study):
        note += f" Drawn in two of {len(further) + 2} objectives: what looks beaten here is better in another."
    return f"""<section><h2>{title}</h2><p class="note">{note} Choose a point to see the network.</p>
<div class="explore">
<div class="card plotcard"><div class="plotbar"><span class="note">Bars are one standard error.</span>{switch}</div>
<div class="plot" id="pareto"></div><ul class="shapes">{"".join(shapes)}</ul></div>
<div class="card panel" id="panel" aria-live="polite"><p class="note">Choose a point of the plot.</p></div>
</div></section>"""


def _further(study: StudyFiles) -> str:
    """The front along the objectives that the main plot leaves out; empty where there are none."""
    words = {objective.metric: objective.word[0].upper() + objective.word[1:] for objective in OBJECTIVES.values()}
    cards = "".join(
        f'<div class="card plotcard"><h3>{words[metric]}</h3><div class="plot small" id="further-{metric}"></div></div>'
        for metric in tables.further_metrics(study)
    )
    return f'<section class="pair">{cards}</section>' if cards else ""


def _what_was_done(study: StudyFiles) -> str:
    """What stands behind the final networks' numbers."""
    source = tables.stand_in(study)
    trained = (
        f"Nothing was trained: {tables.STAND_INS[source]} stand in for accuracy.{_prior(study)}"
        if source
        else "Final networks were trained on the full schedule with fresh seeds."
    )
    sources = tables.device_sources(study)
    if any(network.latency_source == tables.MEASURED for network in study.finalists):
        timed = "They were timed again in fresh processes."
        if sources:
            first, *others = map(escape, sources)
            timed = f"They were timed again in fresh processes on {first}; latencies on {' and '.join(others)} are as predicted."
    elif sources:
        timed = f"They were not measured again: {escape(next(iter(sources)))}, named first, is not attached here."
    else:
        timed = "The device is not attached, so their latencies are from its table and were not measured again."
    chosen = "The front was chosen on validation images; test images were read once, afterwards."
    return " ".join([trained, timed, *([chosen] if tables.test_was_read(study) else [])])


def _prior(study: StudyFiles) -> str:
    """How far the published trend, or the supernet's scores, can be believed; empty where neither was used."""
    if isinstance(known := study.settings.get("supernet"), dict):
        return f" {tables.supernet_in_words(known)}"
    prior = study.settings.get("prior")
    if not isinstance(prior, dict):
        return ""
    return (
        f" Their trend over MACs, params, activations and pixels foretells one of the {prior['n_networks']} published networks from the "
        f"others to {prior['rmse_points']:.2f} points (Spearman {prior['spearman']:.2f}), networks of other families "
        f"to {prior['relatives_rmse_points']:.1f}."
    )


def _latency_sources(study: StudyFiles) -> set[str]:
    return {network.latency_source for network in (*study.sample, *study.candidates, *study.finalists)}


def _family(study: StudyFiles) -> str:
    comparisons = tables.against_family(study)
    if not comparisons:
        return ""
    note = (
        "Each hand-made network beside the proposed ones nearest to it: the most accurate that is not slower, and the fastest that is not "
        "less accurate. Both were picked on validation images; the differences are on test images where those were read."
    )
    columns = [
        ("Hand-made network", ""), ("Latency", "number"), ("Accuracy", "number"), ("At equal latency", ""), ("Points", "number"),
        ("At equal accuracy", ""), ("Latency change", "number"), ("Beaten", ""),
    ]  # fmt: skip
    rows = "".join(_family_row(study, comparison) for comparison in comparisons)
    return _table_section("Against the hand-made family", note, _head(columns), rows)


def _family_row(study: StudyFiles, comparison: FamilyComparison) -> str:
    member, gain, change = comparison.member, comparison.accuracy_gain, comparison.latency_change
    faster, as_good, beaten_by = comparison.at_equal_latency, comparison.at_equal_accuracy, comparison.beaten_by
    accuracy = tables.comparable_accuracy(*study.finalists)
    cells = [
        _cell(_dotted(study, member)),
        _cell(milliseconds(member.latency_ms, member.latency_std_ms), "number"),
        _cell(percent(accuracy(member), member.accuracy_std), "number"),
        _cell(_dotted(study, faster) if faster else "all are slower"),
        _cell(percent(gain.value, gain.std, signed=True).removesuffix(" %"), f"number {_tone(gain.value, gain.std)}"),
        _cell(_dotted(study, as_good) if as_good else "none as accurate"),
        _cell(percent(change.value, change.std, signed=True), f"number {_tone(-change.value, change.std)}"),
        _cell(f"by {_choice(study, beaten_by)}" if beaten_by else "no"),
    ]
    return f"<tr>{''.join(cells)}</tr>"


def _tone(gain: float, std: float) -> str:
    """Colour of a difference that its own error does not explain."""
    if not abs(gain) > tables.STANDARD_ERRORS_TO_BEAT * std:
        return ""
    return "good" if gain > 0 else "bad"


# ---- hypervolume, MACs


def _background(study: StudyFiles) -> str:
    cards = []
    if study.hypervolume:
        title = "Hypervolume over time"
        note = (
            "What the networks known so far dominate, up to the study's fixed reference point, on validation images; costs are logarithms."
        )
        if len(tables.objectives(study)) == 1:
            title, note = "The best over time", "Of all networks scored so far, by the search's estimates."
        cards.append(_plot_card(title, note, "hypervolume"))
    cost = tables.cost_against_latency(tables.cost_networks(study))
    if cost is not None:
        note = (
            f"Over {cost.n_networks} members of the space, MACs rank {cost.source} latency with Spearman {cost.spearman:.3f}. "
            f"Networks of equal MACs (within 5 %) still differ by up to {cost.largest_ratio:.2f} times."
        )
        cards.append(_plot_card("MACs against latency", note, "cost"))
    return f'<section class="pair">{"".join(cards)}</section>' if cards else ""


def _plot_card(title: str, note: str, name: str) -> str:
    heading = f'<h2>{title}</h2><p class="note">{escape(note)}</p>'
    return f'<div class="card plotcard">{heading}<div class="plot small" id="{name}"></div></div>'


# ---- the networks as a table


def _networks(study: StudyFiles) -> str:
    networks = study.finalists or tables.scored_candidates(study)
    if not networks:
        return ""
    title = "Final networks" if tables.finals_are_known(study) else "Candidates so far"
    note = "Click a heading to sort, a name to see the network."
    origins = sorted({network.accuracy_std_origin for network in networks} - {""})
    if origins:
        note += f" Standard error of accuracy: {escape('; '.join(origins))}."
    others = dict(list(tables.device_sources(study).items())[1:])
    on = "".join(f" on {escape(label)}" for label in list(tables.device_sources(study))[:1])
    columns = [
        ("Network", ""), ("Origin", ""), ("On front", ""), ("Test accuracy", "number"), ("Validation accuracy", "number"),
        (f"Latency{on}", "number"), ("Predicted latency", "number"), ("Sources", ""), *(
            (f"Latency on {escape(label)}, {escape(source)}", "number") for label, source in others.items()
        ), *((word, "number") for word, _ in _asked(study)),
        ("MACs", "number"), ("Parameters", "number"), ("Pixels", "number"),
    ]  # fmt: skip
    front = {network.arch_id for network in tables.best_known_front(study)}
    by_latency = sorted(networks, key=lambda network: network.latency_ms)
    rows = "".join(_network_row(study, network, on_front=network.arch_id in front) for network in by_latency)
    return _table_section(title, note, _head(columns, sortable=True), rows, style=' class="sortable"')


def _asked(study: StudyFiles) -> list[tuple[str, Metric]]:
    """What the table shows beyond its usual columns, by its heading: the other metrics that the study has objectives or limits on."""
    usual = ("accuracy", "latency_ms", "macs", "params")
    asked = tables.asked_metrics(study)
    return [(o.word.capitalize(), o.metric) for o in OBJECTIVES.values() if o.metric in asked and o.metric not in usual]


def _with_unit(network: Network) -> str:
    """Where its accuracy is from; a score that is none says so."""
    return f"{network.accuracy_source} (rank)" if network.accuracy_unit == "rank" else network.accuracy_source


def _network_row(study: StudyFiles, network: Network, *, on_front: bool) -> str:
    cells = [
        _cell(_dotted(study, network), value=network.label),
        _cell(escape(network.origin)),
        _cell("yes" if on_front else escape(f"breaks {network.breaks}") if network.breaks else ""),
        _cell(percent(network.test_accuracy, network.accuracy_std), "number", network.test_accuracy),
        _cell(percent(network.val_accuracy, network.accuracy_std), "number", network.val_accuracy),
        _cell(milliseconds(network.latency_ms, network.latency_std_ms), "number", network.latency_ms),
        _cell(milliseconds(network.predicted_latency_ms), "number", network.predicted_latency_ms),
        _cell(escape(", ".join(filter(None, (_with_unit(network), network.latency_source)))), "mark"),
        *(_cell(milliseconds(ms), "number", ms) for ms in list(network.by_device.values())[1:]),
        *(
            _cell(tables.amount(getattr(network, metric), tables.UNITS[metric]), "number", getattr(network, metric))
            for _, metric in _asked(study)
        ),
        _cell(tables.count(network.macs), "number", network.macs),
        _cell(tables.count(network.params), "number", network.params),
        _cell(tables.count(network.resolution_px), "number", network.resolution_px),
    ]
    return f'<tr data-arch="{escape(network.arch_id)}">{"".join(cells)}</tr>'


def _choice(study: StudyFiles, network: Network) -> str:
    """The network's name, as a button that shows it where its stages are known."""
    label = escape(network.label)
    if network.arch_id not in study.networks:
        return label
    return f'<button type="button" class="link" data-choose="{escape(network.arch_id)}">{label}</button>'


def _dotted(study: StudyFiles, network: Network) -> str:
    """The network's name behind the colour that it has in the plots."""
    return f'<span class="dot{" family" if network.is_family else ""}"></span>{_choice(study, network)}'


def _table_section(title: str, note: str, head: str, rows: str, *, style: str = "") -> str:
    table = f"<table{style}><thead>{head}</thead><tbody>{rows}</tbody></table>"
    return f'<section><h2>{title}</h2><p class="note">{note}</p>\n<div class="card scroll">{table}</div></section>'


def _head(columns: Sequence[tuple[str, str]], *, sortable: bool = False) -> str:
    def head(word: str, style: str) -> str:
        inside = f'<button type="button">{word}</button>' if sortable else word
        return f'<th scope="col" class="{style}">{inside}</th>'

    return f"<tr>{''.join(head(*column) for column in columns)}</tr>"


def _cell(content: str, style: str = "", value: float | str | None = None) -> str:
    """A table cell; `content` is markup. `value` is what the column sorts by, empty where it is not known."""
    sorts_by = (f"{value:.9g}" if math.isfinite(value) else "") if isinstance(value, int | float) else value
    attributes = f' class="{style.strip()}"' if style.strip() else ""
    attributes += f' data-value="{escape(sorts_by)}"' if sorts_by is not None else ""
    return f"<td{attributes}>{content}</td>"


# ---- how to go on, how to read


@dataclass(frozen=True, slots=True)
class Step:
    """Something to do with a network of the study. ARCH_ID in `command` stands for the chosen one."""

    what: str
    command: str
    needs_weights: bool = False


def next_steps(study: StudyFiles) -> list[Step]:
    """How to go on from the page."""
    folder = f"studies/{study.name}/models/ARCH_ID"
    load = f"""from lowsearch import Arch, build_model
arch = Arch.from_json(open("{folder}/arch.json").read())
model = build_model(arch, pretrained="{folder}/model.safetensors")"""
    return [
        Step("Train it longer", f"lowsearch train {study.name} --arch ARCH_ID --epochs 30"),
        Step("Train it on data of your own", f"lowsearch train {study.name} --arch ARCH_ID --data folder:PATH"),
        Step("Use its weights in Python", load, needs_weights=True),
        Step("Search on: the same study with more time", f"lowsearch run --study {study.name} --budget 30m"),
    ]


def _next_steps(study: StudyFiles) -> str:
    def html(step: Step) -> str:
        text = escape(step.command)
        line = f'<pre data-command="{text}">{text}</pre><button type="button" class="quiet" data-copy>Copy</button>'
        needs = " data-needs-weights" if step.needs_weights else ""
        return f'<div class="step"{needs}><p>{escape(step.what)}</p><div class="command">{line}</div></div>'

    note = 'The commands are for <b id="chosen-name">the chosen network</b>.'
    steps = "".join(map(html, next_steps(study)))
    return f'<section><h2>Go on from here</h2><p class="note">{note}</p>\n<div class="card go">{steps}</div></section>'


def _reading(study: StudyFiles) -> str:
    used = _latency_sources(study) | {n.accuracy_source for n in (*study.finalists, *study.candidates, *study.sample)}
    words = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in SOURCES.items() if word in used)
    return f"""<section><h2>How to read this page</h2>
<p class="note">{READING}</p>
<details><summary>Where each number is from</summary><dl>{words}</dl></details>
<details><summary>All settings of the study</summary><pre>{escape(_as_yaml(study.settings))}</pre></details></section>"""


def _as_yaml(settings: Mapping[str, Any]) -> str:
    import yaml

    return yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
