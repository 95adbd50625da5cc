"""What CUDA would refuse, wait for or replay, on GPUs that are pretended (tools/diagnostics/pretended_cuda.py)."""

import numpy as np
import pytest
import torch
from conftest import load_module, run_main
from runs import assert_same_run, only_folder, rows

cuda = load_module("tools/diagnostics/pretended_cuda.py")
ENV = "Hopper-v4"
SIZES = {
    "env": ENV,
    "hidden_dim": 8,
    "vae_hidden_dim": 8,
    "fit_hidden_dim": 8,
    "batch_size": 16,
    "compile": "false",
    "offline_iterations": 12,
    "vae_iterations": 12,
    "fit_iterations": 12,
    "online_iterations": 60,
    "warmup_steps": 20,
    "buffer_size": 50,
    "coefficient_frequency": 30,
    "eval_frequency": 40,
    "n_test_episodes": 1,
    "log_frequency": 5,
    "checkpoint_frequency": 5,
    "adapt_iterations": 2,
    "mastered_share": 0.5,
    "threads": 1,
}
KINDS = {"awac": ("AWAC", "GuidedRun"), "iql": ("IQL", "IQLRun"), "cql": ("CQL", "GuidedRun")}
KINDS |= {"calql": ("CalQL", "CalQLRun")}
OPTIONS = {  # what takes another path through an update
    "awac": [{}],
    "iql": [{}, {"iql_deterministic": True, "actor_dropout": 0.1}],
    "cql": [{"cql_lagrange": True, "cql_max_target_backup": True, "bc_steps": 5, "target_update_period": 2}],
    "calql": [{}, {"backup_entropy": True, "use_automatic_entropy_tuning": False}],
}
COEFFICIENTS = ("vae", "likelihood", "rnd", "embedding")
STATE, ACTION = np.zeros(11, np.float32), np.zeros(3, np.float32)


@pytest.fixture(params=KINDS)
def files(request):
    """An algorithm's name, module, class and Run."""
    module = request.getfixturevalue(request.param)
    return request.param, module, *(getattr(module, kind) for kind in KINDS[request.param])


def make_run(files, device, folder, n=300, **settings):
    """A run that is not begun, with random rows for a data set."""
    _, module, algorithm, run_class = files
    run = run_class(module.TrainConfig(device=device, runs_dir=str(folder), **SIZES | settings), algorithm)
    rows = np.random.default_rng(0).random((n, 11 * 2 + 3 + 4), dtype=np.float32)
    run.dataset = run.new_buffer(n + run.config.online_iterations if run.keeps_offline_data() else n)
    run.dataset.load(rows)
    return run


def start_online(run):
    run.start_online()
    for i in range(20):
        run.remember(STATE + i, ACTION, 1.0, STATE, False)


def values(run):
    """All that updates change: networks, buffers and the optimisers' moments."""
    states = [row for part in run.parts.values() if hasattr(part, "param_groups") for row in part.state.values()]
    tensors = [run.agent.state_dict(), run.coefficient.state_dict(), *states]
    return [value.clone() for state in tensors for value in state.values() if torch.is_tensor(value)]


# --- The pretence itself
def on_gpu(*shape, device="cuda"):
    return torch.ones(*shape, device=device)


REFUSED = {
    "two devices": lambda: on_gpu(3) + torch.ones(3),
    "two GPUs": lambda: on_gpu(3) * on_gpu(3, device="cuda:1"),
    "an index on the GPU": lambda: torch.ones(3)[on_gpu(1).long()],
    "numpy": lambda: on_gpu(3).numpy(),
    "a layer left behind": lambda: torch.nn.Linear(3, 2)(on_gpu(1, 3)),
    "a list": lambda: torch.cat([on_gpu(1), torch.ones(1)]),
}
WAITING = {
    "item": lambda: on_gpu(3).sum().item(),
    "truth": lambda: bool(on_gpu(1) > 0),
    "a copy down": lambda: on_gpu(3).cpu(),
    "a copy up": lambda: torch.ones(3).to("cuda"),
    "a mask": lambda: on_gpu(3)[on_gpu(3) > 0],
    "into a row": lambda: on_gpu(3, 2).__setitem__(0, torch.ones(2)),
}


@pytest.mark.parametrize("what", REFUSED)
def test_the_pretence_refuses_what_cuda_refuses(what):
    with cuda.pretended(), pytest.raises(cuda.DeviceError):
        REFUSED[what]()


@pytest.mark.parametrize("what", WAITING)
def test_the_pretence_counts_what_waits(what):
    with cuda.pretended() as mode:
        WAITING[what]()
        assert mode.waits.total() == 1
        torch.nn.Linear(3, 2).to("cuda")(on_gpu(1, 3)).sum().backward()


def test_a_recording_carries_nothing_out_until_it_is_replayed():
    with cuda.emulated_graphs():
        x, rate, graph = torch.zeros(2), torch.tensor(1.0), torch.cuda.CUDAGraph()
        torch.manual_seed(0)
        with torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            x.add_(rate * torch.rand(2))
        assert not x.any()
        graph.replay()
        rate.fill_(10.0)
        graph.replay()
        torch.manual_seed(0)
        assert torch.equal(x, torch.rand(2) + 10 * torch.rand(2))
        with pytest.raises(cuda.DeviceError), torch.cuda.graph(graph, stream=torch.cuda.Stream()):
            x.sum().item()


# --- Waits
@pytest.mark.parametrize("guided", [False, True])
def test_an_update_waits_for_nothing(files, guided, tmp_path):
    for options in OPTIONS[files[0]]:
        with cuda.pretended() as mode:
            run = make_run(files, "cuda", tmp_path, graphs="false", **options)
            start_online(run)
            run.update(run.buffer, guided=guided)
            mode.waits.clear()
            metrics = run.update(run.buffer, guided=guided)
            assert not mode.waits and all(value.is_cuda for value in metrics.values())


@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_an_update_of_a_fit_waits_for_nothing(awac, kind, tmp_path):
    with cuda.pretended() as mode:
        run = make_run(("awac", awac, awac.AWAC, awac.GuidedRun), "cuda", tmp_path, coefficient=kind, graphs="false")
        run.fit_step(run.dataset, 0)
        mode.waits.clear()
        run.fit_step(run.dataset, 1)
        assert not mode.waits


def test_an_online_step_waits_for_the_actor_alone(files, tmp_path):
    with cuda.pretended() as mode:
        run = make_run(files, "cuda", tmp_path, graphs="false")
        start_online(run)
        run.agent.act(STATE, deterministic=False)
        mode.waits.clear()
        run.remember(STATE, ACTION, 1.0, STATE, False)
        run.agent.act(STATE, deterministic=False)
        assert not mode.waits  # nothing has changed the actor
        run.update(run.buffer, guided=True)
        run.agent.live_arrays.fetch()
        assert not mode.waits
        run.agent.act(STATE, deterministic=False)
        assert mode.waits == {"synchronize": 1}


def test_acting_on_a_gpu_follows_updates_and_loads(files, tmp_path):
    with cuda.pretended():
        run = make_run(files, "cuda", tmp_path, graphs="false")
        start, state = run.agent.act(STATE, deterministic=True), [run.agent.state_dict()]
        state = {name: value.clone() for name, value in state[0].items()}
        run.update(run.dataset)
        moved = run.agent.act(STATE, deterministic=True)
        run.agent.load_state_dict(state)
        back = run.agent.act(STATE, deterministic=True)
    assert not np.array_equal(start, moved)
    np.testing.assert_array_equal(start, back)


# --- Graphs
@pytest.mark.parametrize("held", [False, True])
def test_replayed_updates_equal_ordinary_ones(files, held, tmp_path):
    for options in OPTIONS[files[0]]:
        results = []
        for graphs in ("false", "auto"):
            with cuda.pretended() as mode:
                run = make_run(files, "cuda", tmp_path, graphs=graphs, **options)
                start_online(run)
                run.agent.policy_held, metrics = held, []
                for i in range(12):
                    row = run.update(run.buffer, guided=i % 2 == 0)
                    metrics.append({name: value.item() for name, value in row.items()})
                    run.remember(STATE, ACTION, float(i), STATE + i, False)  # the buffer grows
                results.append((values(run), metrics, mode.get_state("cuda")))
                assert graphs == "false" or run.replay.recorded
        (ordinary, metrics, stream), (replayed, others, other) = results
        assert all(map(torch.equal, ordinary, replayed)) and metrics == others and torch.equal(stream, other)


@pytest.mark.parametrize("kind", COEFFICIENTS)
def test_replayed_updates_of_a_fit_equal_ordinary_ones(awac, kind, tmp_path):
    results = []
    for graphs in ("false", "auto"):
        with cuda.pretended():
            settings = {"coefficient": kind, "graphs": graphs, "vae_kl_target": 0, "vae_kl_annealing": 10}
            run = make_run(("awac", awac, awac.AWAC, awac.GuidedRun), "cuda", tmp_path, **settings)
            for step in range(12):
                run.fit_step(run.dataset, step)
            results.append(values(run))
            assert graphs == "false" or len(run.replay.recorded) == 1
    assert all(map(torch.equal, *results))


def test_a_mixed_batch_on_a_gpu_has_its_shares(calql):
    with cuda.pretended():
        buffer = calql.MixingBuffer(200, 2, 1, "cuda", 0.25)
        buffer.load(np.zeros((100, 9), np.float32))
        for _ in range(90):
            few = buffer.size - buffer.kept < 30
            online = int(buffer.sample(40).rewards.sum().item())
            assert online == (0 if few else 30)
            buffer.add(STATE[:2], ACTION[:1], 1.0, STATE[:2], False)


def test_what_cannot_be_recorded_runs_without_or_is_refused(awac, capsys):
    def waits(x):
        return {"sum": x.add_(1).sum().item()}

    with cuda.pretended():
        replay, x = awac.Replay("cuda", "auto"), torch.zeros(2, device="cuda")
        assert [replay(waits, x)["sum"] for _ in range(5)] == [2.0, 4.0, 6.0, 8.0, 10.0]
        assert "cannot be recorded as a CUDA graph: _local_scalar_dense" in capsys.readouterr().out
        replay = awac.Replay("cuda", "true")
        with pytest.raises(SystemExit, match="error: .* --graphs auto does without"):
            [replay(waits, x) for _ in range(4)]
    with pytest.raises(SystemExit, match="error: graphs: true needs CUDA, this run is on cpu"):
        awac.Replay("cpu", "true")
    assert awac.Replay("cpu", "auto")(lambda x: x, 1) == 1


# --- Whole runs
def whole_run(files, folder, *words, **settings):
    _, module, algorithm, run_class = files
    with cuda.pretended() as mode:
        run_main(algorithm, run_class, *words, **({} if words else {"runs_dir": folder} | SIZES), **settings)
    return mode


def test_a_run_stays_on_its_gpu_and_its_graphs_change_nothing(files, hopper_file, tmp_path):
    for graphs in ("false", "auto"):
        mode = whole_run(files, tmp_path / graphs, dataset=hopper_file, device="cuda:1", graphs=graphs)
        assert mode.touched.keys() == {"cuda:1"}
    assert_same_run(*(only_folder(tmp_path / graphs) for graphs in ("false", "auto")))


class Stop(Exception):
    pass


@pytest.mark.parametrize("phase", ["offline", "coefficient", "online"])
def test_a_run_on_the_second_gpu_resumes_with_its_stream(awac, hopper_file, phase, monkeypatch, tmp_path):
    files = ("awac", awac, awac.AWAC, awac.GuidedRun)
    settings = {"dataset": hopper_file, "device": "cuda:1", "max_episode_steps": 8}
    whole_run(files, tmp_path / "whole", **settings)
    report = awac.Run.report

    def stop(run, name, step, *rest):
        report(run, name, step, *rest)
        if (name, step) == (phase, {"online": 50}.get(name, 9)):
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(awac.Run, "report", stop)
        whole_run(files, tmp_path / "cut", **settings)
    assert len(rows(only_folder(tmp_path / "cut"))) < len(rows(only_folder(tmp_path / "whole")))
    whole_run(files, None, "--resume", only_folder(tmp_path / "cut"))
    assert_same_run(only_folder(tmp_path / "cut"), only_folder(tmp_path / "whole"))
