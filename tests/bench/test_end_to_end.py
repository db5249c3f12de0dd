"""Tests of the benchmark of whole models: rivals compute what their names say, and all are measured the same way."""

import copy
import json
import sys
from pathlib import Path

import pytest
import timm
import torch
from helpers import tiny_guidance, tiny_vit, varied_images

sys.path.insert(0, str(Path(__file__).parents[2] / "bench"))

import end_to_end
import end_to_end_page
import mixes
import rivals
import tome
import turns
from padded import PaddedDropping

import tinydrop_kernels as tdk
from tinydrop_kernels.families.flops import count_flops

KINDS = {
    "plain": {},
    "DeiT-3": {"no_embed_class": True, "init_values": 0.1},
    "registers": {"reg_tokens": 3, "init_values": 0.1, "qk_norm": True},
}
SMOKE = {**end_to_end.SMOKE_SETTING, "dtype": torch.float32}


def close(one, other):
    return torch.allclose(one, other, rtol=1e-4, atol=1e-4)


@pytest.fixture(params=KINDS.values(), ids=KINDS)
def model(request):
    return tiny_vit(**request.param)


@pytest.fixture(scope="module")
def subject():
    return rivals.Subject("vit_tiny_patch16_224", **SMOKE)


class TestTokenMerging:
    @torch.inference_mode()
    def test_nothing_merged_is_dense(self, model):
        images = varied_images(3)
        assert close(tome.TokenMerging(model, 0)(images), model(images))

    @pytest.mark.parametrize("total", [0, 1, 7, 10])
    @torch.inference_mode()
    def test_tokens_and_flops(self, model, total):
        merging, images = tome.TokenMerging(model, total), varied_images(2)
        with turns.counting() as counter:
            merging(images)
        first = total // 2
        assert merging.tokens == [model.num_prefix_tokens + left for left in (16 - first, 16 - total)]
        assert counter.get_total_flops() == 2 * tome.flops(model, total)
        if total == 0:
            assert tome.flops(model, 0) == count_flops(model, (3, 32, 32))

    def test_never_more_than_half_of_a_layer(self):
        assert tome.merged_by_layer(16, 4, 40) == [8, 4, 2, 1]
        assert tome.merged_by_layer(196, 12, 12 * 8) == [8] * 12  # the paper's r = 8

    def test_the_nearest_in_flops_is_taken(self, model):
        assert [tome.total_for(model, tome.flops(model, total) + 1) for total in (0, 5, 10)] == [0, 5, 10]

    def test_the_most_similar_are_merged_and_means_are_kept(self):
        """Merging equals the paper's steps, written one by one in float64."""
        tokens, keys = torch.randn(2, 9, 4, dtype=torch.float64), torch.randn(2, 9, 3, dtype=torch.float64)
        sizes = torch.randint(1, 4, (2, 9, 1)).double()
        merged, merged_sizes = tome.merge(tokens, sizes, keys, 3)
        assert merged.shape == (2, 6, 4) and torch.equal(merged_sizes.sum(1), sizes.sum(1))
        assert torch.allclose((merged * merged_sizes).sum(1), (tokens * sizes).sum(1))
        for image in range(2):
            cosine = torch.cosine_similarity(keys[image, :, None], keys[image, None], dim=-1)
            edges = [(max(range(1, 9, 2), key=lambda b, a=a: cosine[a, b]), a) for a in range(0, 9, 2)]
            gone = sorted(edges, key=lambda edge: -cosine[edge])[:3]
            groups = [[a] for a in range(0, 9, 2) if a not in {a for _, a in gone}]
            groups += [[b, *(a for into, a in gone if into == b)] for b in range(1, 9, 2)]
            means = [(tokens[image, g] * sizes[image, g]).sum(0) / sizes[image, g].sum() for g in groups]
            found = sorted(merged[image].tolist())
            assert torch.allclose(torch.tensor(found), torch.tensor(sorted(mean.tolist() for mean in means)))

    @torch.inference_mode()
    def test_proportional_attention(self):
        """Merging equal patches without positions changes nothing, because merged tokens keep their weight."""
        model = tiny_vit()
        model.pos_embed.zero_()
        images = torch.randn(2, 3, 8, 8).repeat(1, 1, 4, 4)
        images[:, :, :8] += 1.0  # two kinds of patches, otherwise weights would not matter
        merging = tome.TokenMerging(model, 8)
        assert close(merging(images), model(images)) and merging.tokens == [13, 9]


class TestPaddedDropping:
    @pytest.mark.parametrize("policy", [tdk.DropPolicy.fixed(0.3), "mix"])
    @torch.inference_mode()
    def test_answers_as_the_patched_model(self, model, policy):
        """The policy "mix" has padding, grids of several levels, and exits."""
        patched = tdk.patch(copy.deepcopy(model), tiny_guidance())
        mix = tdk.DropPolicy(0.6, 1.0, 0.25, coarsen=0.5, blend=0.2, second_look=None)
        patched.tinydrop.policy = mix if policy == "mix" else policy
        mixes.SpreadConfidences(patched, 8)
        images = varied_images(8)
        with turns.counting() as counter:
            answers = PaddedDropping(model, patched)(images)
        assert close(answers, patched(images))
        assert counter.get_total_flops() >= patched.tinydrop.report().flops

    @torch.inference_mode()
    def test_where_all_exit(self):
        model = tiny_vit()
        patched = tdk.patch(copy.deepcopy(model), tiny_guidance(), tdk.DropPolicy.cascade(1e-6))
        images = varied_images(2)
        assert torch.equal(PaddedDropping(model, patched)(images), patched(images))


class TestMixes:
    @pytest.mark.parametrize("name", end_to_end.MODELS[:: len(end_to_end.MODELS) - 1])  # the smallest and the largest
    def test_hit_their_share(self, name):
        model = timm.create_model(name, num_classes=1000, device="meta")
        guidance = 2_582_569_472  # EfficientFormer-L1's
        for percent in mixes.EXITS_ABOVE:
            share = mixes.cost(model, guidance, mixes.policy_of(model, guidance, percent)) / mixes.dense_cost(model)
            assert share <= percent / 100 + 0.02
            # The last block of a patched model is cheaper than dense, so a mix of 100 % may cost less.
            assert share >= percent / 100 - (0.04 if percent == 100 else 0.02)

    @pytest.mark.parametrize("percent", mixes.EXITS_ABOVE)
    @torch.inference_mode()
    def test_are_the_same_in_batches_of_any_size(self, subject, percent):
        ratios = []
        for batch in (1, 8, 16):
            case = rivals.Case(subject, batch, percent)
            way = case.way("ours")
            way.attempt(turns.warm_up)
            assert way.why_not is None
            ratios.append(way.round_flops / (case.dense_flops * batch * len(way.batches)))
        assert ratios[0] == pytest.approx(percent / 100, abs=0.02) and ratios == [ratios[0]] * 3

    def test_confidences(self):
        assert mixes.spread(8, 8).tolist() == [[(i + 0.5) / 8 for i in range(8)]]
        for images in (1, 2, 4, 16):
            assert mixes.spread(images, 8).unique().tolist() == mixes.spread(8, 8)[0].tolist()

    def test_what_no_mix_costs_is_refused(self):
        with pytest.raises(ValueError, match="percent: got 20, and the nearest mix has"):
            mixes.policy_of(tiny_vit(), 10**9, 20)


class TestWays:
    @pytest.mark.slow
    @pytest.mark.parametrize("name", end_to_end.SMOKE["ways"])
    @torch.inference_mode()
    def test_runs_its_blocks(self, subject, name):
        """The FLOPs counted during a run equal the FLOPs that the way reports."""
        if name == "onnx":
            pytest.importorskip("onnxscript")
            pytest.importorskip("onnxruntime")
        if name in rivals.GPU_ALONE and not torch.cuda.is_available():
            with pytest.raises(rivals.NotMeasured, match="CUDA graphs need a GPU"):
                rivals.Case(subject, 8, 50).way(name)
            return
        case = rivals.Case(subject, 8, 50)
        way = case.way(name)
        way.attempt(turns.warm_up)
        assert way.why_not is None
        with turns.counting() as counter:
            answers = way.call(way.batches[0])
        assert answers[0].shape == (8, 10) if name == "onnx" else answers.shape == (8, 10)
        if name == "onnx":
            assert close(torch.from_numpy(answers[0]), subject.dense(way.batches[0]))
        elif name == "ours-prepacked":  # torch's counter does not count oneDNN's linear layers
            assert case.subject.patched("prepacked")[0].tinydrop.report().flops == way.round_flops
        elif name in ("ours", "exits"):  # torch's counter does not count our attention
            assert 0.8 < counter.get_total_flops() / way.round_flops <= 1
        else:
            assert counter.get_total_flops() == way.round_flops
        equal = {"dense": 8 * case.dense_flops} | dict.fromkeys(("tome", "resolution"), 8 * case.image_flops)
        if name in equal:
            assert way.round_flops == pytest.approx(
                equal[name], rel=0.1
            )  # loose, because the FLOPs of neighbouring sides differ much

    @torch.inference_mode()
    def test_exits_alone_pay_for_what_stays(self, subject):
        case = rivals.Case(subject, 8, 20)
        way = case.way("exits")
        way.attempt(turns.warm_up)
        assert way.round_flops == mixes.cost(subject.dense, subject.guidance_flops, tdk.DropPolicy.cascade(0.5))
        # Half of the images exit, and the target's last block is cheaper than dense's.
        assert 0.4 < (way.round_flops / 8 - subject.guidance_flops) / case.dense_flops < 0.5
        with pytest.raises(rivals.NotMeasured, match="no image exits"):
            rivals.Case(subject, 8, 100).way("exits")


def ticking(seconds, calls):
    """Return ways whose calls advance a fake clock by the given seconds, and the clock."""
    now = [0.0]

    def call_of(name):
        def call(images):
            calls.append(name)
            now[0] += seconds[name]
            if seconds[name] > 5 and calls.count(name) > 3:
                raise RuntimeError("out of memory\nand more")

        return call

    ways = [turns.Way(name, call_of(name), [0, 1], 4, flops=lambda: 10) for name in seconds]
    return ways, lambda: now[0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU there are more calls, by the real clock")
class TestTurns:
    def test_all_take_turns_and_the_fastest_dense_is_the_rival(self):
        calls: list[str] = []
        ways, clock = ticking({"dense": 4.0, "dense-compiled": 3.0, "ours": 1.0}, calls)
        assert list(turns.take_turns(ways, 2, clock, lambda: False, None)) == [[None, None]] * 2
        assert calls == ["dense"] * 2 + ["dense-compiled"] * 2 + ["ours"] * 2 + calls[6:]
        assert calls[6:] == calls[:6] * 2
        figures = turns.figures(ways[2], ways[:2], 60)
        assert (figures["images_per_s"], figures["p50_ms"], figures["p99_ms"]) == (4.0, 1000.0, 1000.0)
        assert (figures["flops_ratio"], figures["speed_up"], figures["of_ideal"]) == (3.0, 3.0, 1.0)

    def test_one_that_fails_costs_no_other(self):
        ways, clock = ticking({"dense": 4.0, "tome": 6.0}, [])
        list(turns.take_turns(ways, 3, clock, lambda: False, None))
        assert ways[1].why_not == "RuntimeError: out of memory" and ways[0].round_seconds == [8.0] * 3

    def test_late_is_two_rounds(self):
        ways, clock = ticking({"dense": 1.0}, [])
        list(turns.take_turns(ways, 30, clock, lambda: clock() > 0, None))
        assert len(ways[0].round_seconds) == 2

    def test_what_is_not_warm_in_time_is_not_measured(self):
        ways, clock = ticking({"dense": 1.0, "dense-compiled": 1.0}, [])
        list(turns.take_turns(ways, 2, clock, lambda: clock() > 0, None))
        assert [way.why_not for way in ways] == [None, "the deadline came"] and ways[0].round_seconds == [2.0] * 2

    def test_the_profiler_comes_last(self, monkeypatch):
        calls: list[str] = []
        ways, clock = ticking({"dense": 1.0, "ours": 1.0}, calls)
        monkeypatch.setattr(turns, "profiled", lambda call: (call(), calls.append("profiled")) and [("kernel", 3, 7.0)])
        list(turns.take_turns(ways, 2, clock, lambda: False, None))
        assert "profiled" not in calls
        list(turns.take_turns(ways, 2, clock, lambda: False, ["ours"]))
        assert calls[-2:] == ["ours", "profiled"] and calls.count("profiled") == 1
        assert ways[0].profile is None and ways[1].profile == [("kernel", 3, 7.0)]


@pytest.mark.slow
class TestCommand:
    def run(self, monkeypatch, *arguments):
        monkeypatch.setattr(sys, "argv", ["end_to_end.py", *map(str, arguments)])
        end_to_end.main()

    def test_smoke(self, monkeypatch, tmp_path, capsys):
        file, picture = tmp_path / "found.json", tmp_path / "found.png"
        ways = [way for way in end_to_end.SMOKE["ways"] if way != "onnx"]  # its export takes too long
        options = ("--mixes", 20, "--rounds", 1, "--profile", "ours", "--ways", *ways)
        self.run(monkeypatch, "--smoke", "--json", file, *options)
        printed = capsys.readouterr().out
        rows = json.loads(file.read_text())["rows"]
        assert [row["way"] for row in rows] == ways * 2
        measured = {row["way"] for row in rows if row.get("images_per_s", 0) > 0 and row["flops_ratio"] > 0}
        assert measured == {way for way in ways if way not in rivals.GPU_ALONE or torch.cuda.is_available()}
        for row in rows:
            alone = row["batch"] == 1 and row["way"] in ("ours", "ours-prepacked", "exits", "padded")
            assert (row.get("exit_ms") is not None) == alone
        pytest.importorskip("matplotlib")
        self.run(monkeypatch, "--show", file, "--plot", picture)
        assert capsys.readouterr().out == printed and "|20 %|8|" in printed and "|launches|us|share|" in printed
        assert picture.read_bytes().startswith(b"\x89PNG")

    def test_a_kill_costs_one_round(self, monkeypatch, tmp_path):
        """After a kill, the file has all figures measured before."""
        file, rounds = tmp_path / "found.json", []

        def killed(way, clock):
            rounds.append(way.name)
            if len(rounds) > 2:
                raise KeyboardInterrupt
            timed(way, clock)

        timed = turns.timed_round
        monkeypatch.setattr(turns, "timed_round", killed)
        options = ("--mixes", 20, "--batches", 8, "--rounds", 3, "--ways", "dense", "resolution")
        with pytest.raises(KeyboardInterrupt):
            self.run(monkeypatch, "--smoke", "--json", file, *options)
        assert [row["calls"] for row in json.loads(file.read_text())["rows"]] == [1, 1]

    def test_after_the_deadline_every_row_says_so(self, monkeypatch, tmp_path, capsys):
        file = tmp_path / "found.json"
        self.run(monkeypatch, "--smoke", "--json", file, "--deadline", 0, "--mixes", 50, "--batches", 8)
        rows = json.loads(file.read_text())["rows"]
        assert {row["why_not"] for row in rows} == {"the deadline came"} and len(rows) == len(end_to_end.SMOKE["ways"])
        assert capsys.readouterr().out.count("not measured: the deadline came") == len(rows)

    def test_batches_that_have_no_such_mix_are_refused(self, monkeypatch, tmp_path, capsys):
        with pytest.raises(SystemExit):
            self.run(monkeypatch, "--smoke", "--json", tmp_path / "found.json", "--batches", 12)
        assert "--batches: got 12, expected a divisor or a multiple of 8" in capsys.readouterr().err


def test_rivals_that_beat_ours_are_marked():
    case = {"model": "m", "batch": 8, "percent": 50}
    speeds = {"dense": 1.0, "tome": 2.5, "padded": 1.5, "onnx": 3.0, "ours": 2.0, "ours-compiled": 2.6}
    rows = [case | {"way": way, "images_per_s": speed} for way, speed in speeds.items()]
    rows.append({"model": "m", "batch": 1, "percent": 50, "way": "tome", "images_per_s": 9.0})
    assert [row["way"] for row in rows if end_to_end_page.beats_ours(row, rows)] == ["tome"]
    setting = dict.fromkeys(("device", "dtype", "guidance", "threads", "clock", "rounds", "torch", "timm"), "x")
    page = end_to_end_page.shown(setting | {"smoke": False, "rows": rows})
    assert "|50 %|8|**tome**|2.5|" in page and "|50 %|8|onnx|3.0|" in page
    assert page.endswith("Faster than ours at equal FLOPs: tome (m, 50 %, batch 8).")
