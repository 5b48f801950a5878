"""Break the method one line at a time and report what the default tests notice: `python tests/mutations.py [PART ...]`.

Each mutation runs the test files that are nearest to its file, from the default set, until the first failure. A
survivor is a missing test, or a change without effect. PART selects files whose names contain it. Half an hour on one
core: every mutation is a forked process, which need not import PyTorch again, and NEAREST begins with the file that is
likely to fail.
"""

import importlib
import os
import shutil
import sys
import tempfile
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"
import pytest

ROOT = Path(__file__).resolve().parent.parent
IMPORTED_ONCE = "accelerate datasets hypothesis matplotlib.pyplot pandas papermill scipy.optimize sklearn.metrics torch"
NEAREST = {
    "config": "schedules cost loop masking bad_input",
    "checkpoints": "faults loop",
    "data": "data causal sentences loop",
    "discrepancy": "discrepancy sentences study",
    "distill": "loop faults study bad_input",
    "fading": "layers",
    "losses": "losses discrepancy causal loop layers",
    "masks": "masking",
    "models": "losses causal teachers",
    "narrowing": "scorers teeth layers invariants widths robustness",
    "precision": "precision invariants",
    "reconstruction": "reconstruction layers",
    "rotation": "reconstruction",
    "runs": "neurons loop faults",
    "schedules": "schedules",
    "sentences": "sentences",
    "scorers": "scorers loop",
    "training": "layers processes sentences loop masking reconstruction invariants",
    "vocabulary": "vocabulary",
    "widths": "widths layers loop",
}
MUTATIONS = [
    ("vocabulary", "totals[part] += uses[token]", "pass"),
    ("vocabulary", "order[token] = last, len(parts), index", "order[token] = index"),
    ("vocabulary", "key=lambda token: (-totals[token], order[token])", "key=lambda token: order[token]"),
    ("vocabulary", "ids[index] = new[token]", "pass"),
    ("vocabulary", '["pad_id"] = new[', '["pad_id"] = len('),
    ("vocabulary", 'entries["unk_id"] = new.get(unknown)', "pass"),
    ("vocabulary", "key=lambda entry: entry[1])", "key=lambda entry: -entry[1])"),
    ("vocabulary", "setattr(config, name, new if", "setattr(model, name, new if"),
    ("vocabulary", "if family(model).positions_after_padding:", "if False:"),
    ("vocabulary", "    copy_derived_attributes(model, stock)\n", ""),
    ("vocabulary", "for module, attribute in sites[parameter]:", "for module, attribute in sites[parameter][:1]:"),
    ("schedules", "1 - _progress(step, start, end)) ** 3", "1 - _progress(step, start, end)) ** 2"),
    ("schedules", "return 1.0 if step < start else final", "return 1.0 if step <= start else final"),
    ("schedules", "min(max((step - start)", "min(max((step - start + 1)"),
    ("losses", ".mul_(temperature / count)", ".mul_(1 / count)"),
    ("losses", "total * (temperature**2 / count)", "total * (temperature / count)"),
    ("losses", "gradient[rows] = difference.mul_(2 / count)", "gradient[rows] = difference.mul_(1 / count)"),
    ("losses", "probabilities.mul_(labelled[rows, None]).div_(count)", "probabilities.div_(count)"),
    ("losses", "torch.full_like(label, -1, dtype", "torch.full_like(label, 1, dtype"),
    ("losses", "factor = gradient_of_loss * 2 * context", "factor = gradient_of_loss * context"),
    ("losses", "_product(difference.mT, query[rows])", "_product(difference, query[rows])"),
    ("losses", "left if factor == 1.0 else left * factor", "left"),
    ("losses", "difference.square().sum() / pairs.expand_as(student).sum()", "difference.square().mean()"),
    (
        "losses",
        "real[:, None, :, None] & real[:, None, None, :]",
        "real[:, None, None, :].expand(-1, 1, real.shape[1], -1)",
    ),
    ("losses", "return states * diagonal + states @", "return states + states @"),
    ("losses", "self.heads.index_select(0, kept[LAYERS].to(device)).gather(1, heads.to(device))", "heads.to(device)"),
    ("losses", "if state not in states]", "if False]"),
    ("fading", "parameter.mul_(factor)", "parameter.mul_(factor**0.9)"),
    ("fading", "norm.bias.lerp_(shift, 1 - factor)", "pass"),
    ("widths", "return [0, *(layer + 1 for layer in layers[:-1]), depth]", "return [0, *(n + 1 for n in layers)]"),
    (
        "widths",
        "config.layer_types[layer] for layer in layers or range(widths.layers)",
        "*config.layer_types[: widths.layers]",
    ),
    (
        "narrowing",
        "sum(len(kept[block.group]) * block.unit for block in blocks)",
        "sum(len(kept[block.group]) for block in blocks)",
    ),
    ("narrowing", "sums[0] = math.inf", "pass"),
    ("narrowing", "forget_parameters(layers[layer].parameters(), optimizer)", "pass"),
    ("training", "score - score.max() - 1 if name.startswith(gone) else score", "score"),
    ("training", "if gone:", "if False:"),
    ("training", "min(losses, key=losses.get)", "max(losses, key=losses.get)"),
    ("training", "layers[layer].load_state_dict(before)", "pass"),
    ("training", "layers.load_state_dict(weights)", "pass"),
    ("training", "for layer in self._leaving:\n            fade(self.student, layer, 0.0)", "pass"),
    ("training", "- {*self._leaving}:", "- set():"),
    ("training", "not self._leaving and is_encoder(self.teacher)", "is_encoder(self.teacher)"),
    (
        "reconstruction",
        "new_states = {old: new for new, old in enumerate(states)}",
        "new_states = {n: n for n in states}",
    ),
    ("losses", "len(labels) / share", "len(labels)"),
    ("losses", 'terms["hidden"] = share.tokens * sum(', 'terms["hidden"] = sum('),
    ("losses", "attended is None else real & attended", "attended is None else real"),
    ("scorers", "return (parameter * gradient).abs_()", "return parameter * gradient"),
    ("scorers", "torch._foreach_lerp(sums, past,", "torch._foreach_lerp(past, sums,"),
    ("scorers", "-crossing.flatten(0, -2).sum(0) if crossing.dim() > 1 else -crossing", "0 * crossing"),
    (
        "scorers",
        "uncertain.lerp_((now - smoothed).abs_(), 1 - self.uncertainty)",
        "uncertain.lerp_((now - smoothed).abs_(), self.uncertainty)",
    ),
    ("scorers", "return -(parameter * gradient)", "return parameter * gradient"),
    ("scorers", "return {name: score - lowest for", "return {name: score for"),
    ("scorers", "return parameter.abs()", "return parameter.square()"),
    (
        "narrowing",
        "return scores.sort(descending=True, stable=True).indices[:count].sort().values",
        "return scores.sort(descending=True, stable=True).indices[:count]",
    ),
    ("narrowing", "scale = math.sqrt(new.head_dim / old.head_dim)", "scale = math.sqrt(old.head_dim / new.head_dim)"),
    (
        "narrowing",
        "return tensor if factor is None else tensor / factor**power",
        "return tensor if factor is None else tensor / factor",
    ),
    ("narrowing", "new.grad = _divided(take(old.grad), factor, 1)", "new.grad = take(old.grad)"),
    (
        "narrowing",
        "inside = inside[:, : narrow.head_dim].sort(dim=1).values",
        "inside = inside[:, -narrow.head_dim :].sort(dim=1).values",
    ),
    (
        "narrowing",
        "state = optimizer.state[new] = optimizer.state.pop(old)",
        "state = optimizer.state[new] = dict(optimizer.state[old])",
    ),
    ("masks", "parameter.grad.index_fill_(axis, indices, 0.0)", "parameter.grad.index_fill_(axis, indices[:-1], 0.0)"),
    ("masks", "wide = Widths.of(self.model) if self.recover else self.widths", "wide = self.widths"),
    ("masks", "score[score.argmax()] += torch.finfo(torch.float64).max / 2", "score[score.argmax()] += 0.0"),
    (
        "masks",
        "variance = (counted - mean).square().mean(-1, keepdim=True)",
        "variance = (inputs[0] - mean).square().mean(-1, keepdim=True)",
    ),
    ("masks", "output / ratios.pop()", "output"),
    ("masks", "weights.index_copy_(axis, indices, values)", "weights.index_copy_(axis, indices, 0 * values)"),
    ("masks", "yield projection, 0, hidden.to(projection.device)", "yield projection, 1, hidden.to(projection.device)"),
    ("data", "(fate < 0.9)), random_ids)", "(fate < 0.8)), random_ids)"),
    ("data", "masked_fill(special, 2.0)", "masked_fill(special, 0.5)"),
    ("data", "own = slice(self.rank, None, self.processes)", "own = slice(0, None, self.processes)"),
    ("data", "self.seed * 1_000_003 + epoch", "self.seed * 1_000_003"),
    (
        "data",
        "torch.cat([input_ids[:, 1:], torch.full_like(input_ids[:, :1], IGNORED)], 1)",
        "torch.cat([input_ids[:, 1:], input_ids[:, :1]], 1)",
    ),
    ("data", 'yield part, Share(*(_size(lengths) / batch["size"]).tolist())', "yield part, Share()"),
    ("data", "pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in pools]", "pools = [*pools]"),
    ("sentences", "weights = mask[..., None].to(states)", "weights = torch.ones_like(states[..., :1])"),
    ("sentences", 'self.prompts.get(self.default_prompt, "") if given is None else given', 'given or ""'),
    ("discrepancy", "(student - teacher).square().sum(-1).mean() / 2", "(student - teacher).square().sum(-1).mean()"),
    (
        "data",
        "generator=torch.Generator().manual_seed(seed))[:count].sort()",
        "generator=torch.Generator().manual_seed(seed)).sort().values[:count].sort()",
    ),
    (
        "losses",
        "(log_teacher.exp() * (log_teacher - log_student)).sum(-1)",
        "(log_student.exp() * (log_student - log_teacher)).sum(-1)",
    ),
    ("discrepancy", "self.measured, 1 - read % 2", "self.measured, read % 2"),
    ("discrepancy", "(blocks * variance).sqrt() / count", "variance.sqrt() / count"),
    (
        "discrepancy",
        "student.train(modes[0]), teacher.train(modes[1])",
        "student.train(modes[1]), teacher.train(modes[0])",
    ),
    ("discrepancy", "sums[name] += float(mean) * count", "sums[name] += float(mean)"),
    ("training", "(processes * terms.total).backward()", "terms.total.backward()"),
    ("training", "if each != sums[0]]", "if each != each]"),
    ("training", "self.compensation.share()", "pass"),
    ("training", "each.grad is None and each not in", "each.grad is not None and each not in"),
    ("training", "(embeddings @ direction.to(embeddings))", "(0 * embeddings)"),
    ("training", "decayed = [parameter for parameter in parameters if parameter.dim() > 1]", "decayed = parameters"),
    ("training", "self.importance.narrow(kept)", "pass"),
    ("training", "self._started += perf_counter() - started", "pass"),
    ("training", "self._kept[name][indices.cpu()] for name", "indices.cpu() for name"),
    (
        "distill",
        "norm = clip_grad_norm_(training.parameters, config.max_grad_norm)",
        "norm = clip_grad_norm_(training.parameters, 1e9)",
    ),
    ("distill", "optimizer.zero_grad()", "pass"),
    ("distill", "if config.still_prunes(step):", "if config.still_prunes(step) and step > 1:"),
    ("distill", "run.rewind(training.step or -1)", "pass"),
    ("config", "step -= step % self.prune_every", "step -= (step + 1) % self.prune_every"),
    ("config", "return step <= self._pruning_steps()[1]", "return step < self._pruning_steps()[1]"),
    (
        "config",
        "start <= step <= end and (step % self.prune_every == 0 or step == end)",
        "start <= step <= end and step % self.prune_every == 0",
    ),
    ("runs", 'for name in ("metrics.jsonl", "blocks.jsonl"):', 'for name in ("metrics.jsonl",):'),
    ("runs", "torch.full((size,), torch.nan)", "torch.zeros(size)"),
    ("checkpoints", "if found.get(name) != written:", "if name not in found:"),
    ("checkpoints", "os.replace(temporary, folder)", "shutil.copytree(temporary, folder)"),
    ("precision", "return nn.functional.linear(*halves)", "return nn.functional.linear(*halves) * 1.01"),
    ("precision", "rows.sum(0).to(weight.dtype) if context", "rows.mean(0).to(weight.dtype) if context"),
    (
        "widths",
        "now[name] = min(wide[name], _rounded_up(now[name], grain))",
        "now[name] = min(wide[name], now[name] // grain * grain)",
    ),
    (
        "models",
        "key = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)",
        "key = key.repeat(1, query.shape[1] // key.shape[1], 1, 1)",
    ),
    (
        "models",
        "scaling = query.shape[-1] ** -0.5 if scaling is None else scaling",
        "scaling = query.shape[-1] ** -0.5",
    ),
    ("reconstruction", "bias += (constant @ lost).to(bias)", "bias += 0.5 * (constant @ lost).to(bias)"),
    ("reconstruction", "read[of_head[0]] = read[LAST]", "pass"),
    ("reconstruction", "deviation = deviation - second.mean()", "pass"),
    ("reconstruction", "base is None or base.numel() > states.numel()", "True"),
    ("rotation", "of_key = values / scale *", "of_key = values *"),
]


def passes(names: list[str], tree: Path) -> bool:
    """Whether the default tests of these files pass in a tree; runs them in a forked process."""
    process = os.fork()
    if process == 0:
        os.chdir(tree)
        os.environ["PYTHONPATH"] = str(tree)
        with open(os.devnull, "w") as nowhere:
            for stream in (1, 2):
                os.dup2(nowhere.fileno(), stream)
        options = ["-n", "0", "-x", "-p", "no:cacheprovider"]
        os._exit(pytest.main([*options, *(f"tests/test_{name}.py" for name in names)]))
    return os.waitpid(process, 0)[1] == 0


def survives(name: str, old: str, new: str, tree: Path) -> bool:
    path = tree / "hdlib" / f"{name}.py"
    text = path.read_text()
    assert text.count(old) == 1, f"{name}: {text.count(old)} times {old!r}"
    path.write_text(text.replace(old, new))
    try:
        return passes(NEAREST[name].split(), tree)
    finally:
        path.write_text(text)


def main() -> None:
    parts = sys.argv[1:] or [""]
    chosen = [each for each in MUTATIONS if any(part in each[0] for part in parts)]
    survivors = []
    sys.dont_write_bytecode = True  # a file that changes twice in a second would be taken for its compiled copy
    sys.path.remove(str(ROOT / "tests"))
    for module in IMPORTED_ONCE.split():
        importlib.import_module(module)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".venv", ".git", "runs", "*.egg-info", "__pycache__", "figures")
        shutil.copytree(ROOT, tree, ignore=ignored)
        files = sorted({test for each in chosen for test in NEAREST[each[0]].split()})
        assert passes(files, tree), f"without a mutation one of these fails: {', '.join(files)}"
        for number, (name, old, new) in enumerate(chosen, 1):
            alive = survives(name, old, new, tree)
            survivors += [f"{name}: {old} -> {new}"] if alive else []
            print(f"{number}/{len(chosen)} {name}: {'SURVIVED' if alive else 'noticed'}: {old}", flush=True)
    print(f"{len(chosen) - len(survivors)} of {len(chosen)} noticed", *survivors, sep="\n")


if __name__ == "__main__":
    main()
