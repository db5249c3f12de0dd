"""Faults that a careless change could bring in, each with the tests that notice it."""

from typing import NamedTuple


class Fault(NamedTuple):
    """One piece of code in one file of the package, what it is replaced by, and test files or tests that then fail."""

    path: str
    old: str
    new: str
    tests: str


FAULTS = [
    # operators
    Fault(
        "ops/select.py",
        "counts.masked_fill_(confidence > tau, 0)",
        "counts.masked_fill_(confidence >= tau, 0)",
        "ops/test_law.py",
    ),
    Fault(
        "ops/select.py",
        "levels += scale < (side + smaller) / 2",
        "levels += scale < smaller",
        "ops/test_law.py ops/test_select.py",
    ),
    Fault(
        "ops/select.py", "budget.masked_fill_(confidence.isnan(), 1.0)", "budget", "ops/test_law.py ops/test_select.py"
    ),
    Fault("ops/select.py", "equal.cumsum(dim=1) <= ", "equal.cumsum(dim=1) < ", "ops/test_select.py"),
    Fault(
        "ops/select.py",
        'mode="bilinear", align_corners=False',
        'mode="bilinear", align_corners=True',
        "ops/test_select.py",
    ),
    Fault("ops/saliency.py", "logit == first, 1.0", "logit == first, 0.5", "ops/test_select.py"),
    Fault("ops/saliency.py", "saliency.norm * unit(norm)", "saliency.norm * norm", "ops/test_select.py"),
    Fault(
        "ops/packing.py",
        "count + num_prefix_tokens if count else 0",
        "count + num_prefix_tokens",
        "ops/test_packing.py",
    ),
    Fault("ops/packing.py", "own_starts - first_row if first_row else own_starts", "own_starts", "ops/test_packing.py"),
    Fault(
        "ops/packing.py",
        "place.where(indices >= 0, -1)",
        "place",
        "ops/test_rows.py ops/test_packing.py families/test_families.py",
    ),
    Fault("ops/gather.py", "rows[:first] = own", "rows[:first] = own * 0", "ops/test_rows.py"),
    Fault(
        "ops/pool.py", "sizes += [min(skip, length), max(length - skip, 0)]", "sizes += [0, length]", "ops/test_pool.py"
    ),
    Fault("ops/embed.py", "kept = kept + pos_embed[patch]", "kept = kept + pos_embed[place]", "ops/test_rows.py"),
    Fault(
        "ops/attention_reference.py",
        "rows.clamp(max=total - 1), rows < ends[:, None]",
        "rows.clamp(max=total - 1), rows <= ends[:, None]",
        "ops/test_attention.py",
    ),
    Fault(
        "ops/attention_reference.py",
        "masked_fill(to_class, differences + 1)",
        "masked_fill(to_class, differences)",
        "ops/test_attention.py",
    ),
    Fault(
        "ops/derived.py",
        "made is None or made.state != state or any(",
        "made is None or any(",
        "engine/test_derived.py",
    ),
    Fault(
        "ops/derived.py",
        "return _training == (0 if kept is None else kept.settled)",
        "return True",
        "engine/test_derived.py",
    ),
    # guidance
    Fault(
        "guidance/model.py",
        "(source_mean - mean) / std",
        "(source_mean - mean) / source_std",
        "guidance/test_guidance.py test_normalization.py",
    ),
    Fault(
        "guidance/model.py", "if id(tensor) in wide and moved.dtype in HALF", "if False", "guidance/test_guidance.py"
    ),
    Fault(
        "guidance/gradcam.py",
        "(logits.gather(1, index) * share).sum(), logits",
        "logits.gather(1, index).sum(), logits",
        "guidance/test_guidance.py",
    ),
    Fault("guidance/folding.py", "if tensor._version == version:", "if True:", "guidance/test_folding.py"),
    # policy
    Fault(
        "policy/blend.py",
        "mixed + math.log1p(-weight)",
        "mixed",
        "policy/test_answers_scale.py families/test_levels.py",
    ),
    Fault(
        "policy/blend.py",
        "(confidence > bar) | (agrees & (confidence > bar_if_agreed))",
        "confidence > bar",
        "policy/test_answers_scale.py families/test_levels.py calibration/test_calibration.py",
    ),
    Fault(
        "policy/drop.py",
        "return self.tau is not None or self.blend > 0 or self.second_look is not None",
        "return self.tau is not None or self.blend > 0",
        "policy",
    ),
    Fault(
        "policy/calibrated.py",
        "if found.weights != known.weights:",
        "if found.name != known.name:",
        "calibration/test_calibration.py",
    ),
    # engine
    Fault(
        "engine/steps.py",
        "return exits.index_copy(0, staying, answers)",
        "return exits.index_copy(0, staying, answers.flip(0))",
        "engine/test_engine.py",
    ),
    Fault(
        "engine/steps.py",
        "second_look[staying] = again",
        "second_look[: len(again)] = again",
        "engine/test_engine.py families/test_levels.py",
    ),
    Fault(
        "engine/steps.py",
        "(plan.selection.counts[staying] < dense) & in_doubt",
        "in_doubt",
        "engine families/test_levels.py",
    ),
    Fault(
        "engine/steps.py",
        "exits = log_probabilities(plan.guidance_logits, answers.dtype)",
        "exits = plan.guidance_logits.to(answers.dtype)",
        "policy/test_answers_scale.py",
    ),
    Fault(
        "engine/target.py",
        "is_whole = len(part.images) == len(images)",
        "is_whole = len(part.images) > 1",
        "engine/test_engine.py families/test_levels.py",
    ),
    Fault(
        "engine/state.py",
        "watch.same_parts() and watch.same_state() and watch.same_hooks()",
        "watch.same_state()",
        "test_misuse.py test_patching.py engine/test_hooks.py",
    ),
    Fault(
        "engine/state.py",
        'left_out = ("_of_thread", "_watch", "guidance_watch")',
        'left_out = ("_of_thread",)',
        "test_patching.py engine/test_cuda_graphs.py engine/test_transforms.py",
    ),
    Fault(
        "engine/watch.py",
        "return any(self._inner_hooks) or bool(global_hooks())",
        "return any(self._inner_hooks)",
        "engine/test_cuda_graphs.py",
    ),
    Fault("engine/features.py", "tokens[starts + places]", "tokens[starts + places - 1]", "engine/test_features.py"),
    Fault("engine/checks.py", "if images.shape[1] != model.in_chans:", "if False:", "engine/test_bad_input.py"),
    Fault(
        "engine/buckets.py",
        "rows if segments == 1 else min(rows, longest)",
        "min(rows, longest) // 2",
        "engine/test_cuda_graphs.py",
    ),
    Fault(
        "engine/cuda_graphs.py",
        "if watch is not self._watch or pointers != self._pointers:",
        "if watch is not self._watch:",
        "engine/test_cuda_graphs.py",
    ),
    Fault("patching.py", "tinydrop.attributes.remove_from()\n    return model", "return model", "test_patching.py"),
    Fault(
        "normalization.py",
        "(sum(values) / len(values),) * channels",
        "values[:1] * channels",
        "test_normalization.py guidance/test_guidance.py visualize",
    ),
    # families
    Fault(
        "families/vit.py",
        "read = 2 if isinstance(model, VisionTransformerDistilled) else 1",
        "read = 1",
        "families/test_families.py",
    ),
    Fault("families/grids.py", "max(1, int(rows * side + 0.5))", "max(1, int(rows * side))", "families/test_levels.py"),
    Fault(
        "families/pools.py",
        'skip = 0 if model.global_pool == "token" else skip',
        "skip = 0",
        "families/test_families.py",
    ),
    Fault(
        "families/rotary.py",
        "torch.cat((sine, cosine + 1), -1)",
        "torch.cat((sine, cosine), -1)",
        "families/test_families.py",
    ),
    Fault("families/beit.py", "torch.stack(tables).sum(0)", "tables[0]", "families/test_families.py"),
    Fault("families/blocks.py", "out = out * gate(x).sigmoid()", "out = out * gate(x)", "families/test_families.py"),
    Fault("families/costs.py", "tokens = prefix + patches", "tokens = patches", "families/test_flops.py"),
    # calibration
    Fault(
        "calibration/bounds.py",
        "return min(1.0, max(chances) + _SURE)",
        "return min(1.0, min(chances) + _SURE)",
        "calibration/test_bounds.py",
    ),
    Fault("calibration/certify.py", "            break\n", "            continue\n", "calibration/test_calibration.py"),
    Fault(
        "calibration/certify.py",
        "table.take(shuffled[:parted]), table.take(shuffled[parted:])",
        "table.take(shuffled[:parted]), table.take(shuffled[:parted])",
        "calibration/test_calibration.py",
    ),
    Fault(
        "calibration/sweep.py",
        "members.mean(1) * of_cell[reduction]",
        "members.mean(1) * of_cell[view.reductions[DENSE]]",
        "calibration/test_calibration.py",
    ),
    Fault(
        "calibration/table.py", "found[counts == 0] = -1", "found[counts == 0] = 0", "calibration/test_calibration.py"
    ),
    # predict, visualize, command line
    Fault("predict/images.py", "image = ImageOps.exif_transpose(image)", "pass", "predict/test_images.py"),
    Fault("predict/row_file.py", "os.fsync(self._file.fileno())", "pass", "predict/test_row_file.py"),
    Fault("predict/row_file.py", "left[name] -= 1", "pass", "predict/test_row_file.py"),
    Fault("predict/row_format.py", " and record.count(b'\"') % 2 == 0", "", "predict/test_row_file.py"),
    Fault("predict/run_record.py", "if earlier.get(name) != about[name]:", "if False:", "cli/test_cli.py"),
    Fault(
        "predict/whole_file.py",
        "    finally:\n        part.unlink(missing_ok=True)",
        "    finally:\n        pass",
        "predict/test_whole_file.py",
    ),
    Fault(
        "predict/loading.py",
        "elif set(named) == {0} and len(names) == len(class_names):",
        "elif names:",
        "cli/test_calibrate_command.py",
    ),
    Fault("predict/evaluation.py", "images = self.images + 2", "images = self.images", "predict/test_evaluation.py"),
    Fault("predict/evaluation.py", "            tinydrop.dense(images)\n", "", "predict/test_evaluation.py"),
    Fault("cli/target.py", "model.pretrained_cfg | given", "model.pretrained_cfg", "cli/test_target.py"),
    Fault(
        "predict/prediction.py",
        "return round(value, 4) if math.isfinite(value) else None",
        "return round(value, 4)",
        "predict visualize cli/test_cli.py",
    ),
    Fault(
        "cli/options.py",
        'if options["second_look"] == (0, 0):',
        'if options["second_look"] == (1, 1):',
        "cli/test_cli.py",
    ),
    Fault(
        "cli/classify_command.py",
        "        context.exit(interruption.status or 130)\n    if predictor",
        "    if predictor",
        "cli/test_cli.py",
    ),
    Fault("cli/classify_command.py", "predictor.unreadable[reported:before]", "[]", "cli/test_cli.py"),
    Fault("cli/classify_command.py", "            interruption.check()\n", "", "cli/test_cli.py"),
    Fault("cli/interruption.py", "if handler is not signal.SIG_IGN}", "if True}", "cli/test_cli.py"),
    # the fit of a guidance model
    Fault("guidance/fitting.py", "bias.detach() - unscaled @ mean", "bias.detach()", "guidance/test_fitting.py"),
    Fault("guidance/fitting.py", "+ decay / 2 * weight", "+ decay * weight", "guidance/test_fitting.py"),
    Fault("guidance/fitting.py", "HELD_OUT == HELD_OUT - 1", "HELD_OUT == 0", "guidance/test_fitting.py"),
    Fault(
        "guidance/fitting.py",
        "fit_heads(features[~held_out], wanted[~held_out], DECAYS)",
        "fit_heads(features, wanted, DECAYS)",
        "guidance/test_fitting.py",
    ),
    Fault("guidance/fitting.py", "F.one_hot(labels, classes)) / 2", "0 * probabilities)", "guidance/test_fitting.py"),
    Fault("guidance/fitting.py", "images.float(), mean, std)", "images.float())", "guidance/test_fitting.py"),
    Fault(
        "guidance/fitting.py",
        'model.tinydrop.dense if hasattr(model, "tinydrop") else model',
        "model",
        "guidance/test_fitting.py",
    ),
    Fault("guidance/fitting.py", "(one.agreement, -one.flops)", "one.agreement", "guidance/test_fitting.py"),
    Fault("guidance/fitting.py", "backbone = copied(guidance)", "backbone = guidance", "guidance/test_fitting.py"),
    Fault(
        "guidance/fitting.py",
        'load_model(os.fspath(folder), "guidance")',
        "pass",
        "guidance/test_fitting.py",
    ),
    Fault("engine/batches.py", "if not images.is_floating_point():", "if False:", "guidance/test_fitting.py"),
    Fault("engine/batches.py", "labelled not in (None, labels is not None)", "False", "guidance/test_fitting.py"),
    Fault("cli/fit_command.py", "if any(out.iterdir()):", "if False:", "cli/test_fit_command.py"),
    Fault("cli/fit_command.py", "chosen = best(fitted)", "chosen = fitted[0]", "cli/test_fit_command.py"),
    Fault("cli/fit_command.py", "None if no_labels else", "", "cli/test_fit_command.py"),
]
