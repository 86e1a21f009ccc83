import pickle
import sys
import zipfile

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sglang_dumps import (
    DENSE,
    EXPERTS,
    LAYERS,
    PHYSICAL,
    logical_ids,
    pass_record,
    physical_map,
    save,
    token_record,
)
from trace_cases import one_line_errors

from placer.core.errors import DependencyError, InputFileError, MismatchError
from placer.core.model import ModelSpec
from traces.counts import LoadCounts
from traces.readers import read_any
from traces.readers.requests import infer_requests
from traces.readers.sglang import read_sglang
from traces.readers.torch_file import load_torch_file

torch = pytest.importorskip("torch")
MODEL = ModelSpec.uniform("m", num_experts=EXPERTS, top_k=2, moe_layers=(1, 2, 3), num_hidden_layers=LAYERS)
MAP = physical_map()
EXTEND, DECODE, MIXED = 1, 2, 3


def stat_counts(steps=5, seed=0):
    counts = np.random.default_rng(seed).integers(1, 99, (steps, LAYERS, EXPERTS)).astype(np.int32)
    counts[:, DENSE] = 0
    counts[steps - 2 :] = 0
    return counts


def save_stat(path, counts):
    dump = {"rank": 0, "logical_count": torch.tensor(counts), "average_utilization_rate_over_window": None}
    torch.save(dump, path)


@pytest.mark.parametrize("model", [None, MODEL])
def test_stat_dump(model, tmp_path):
    counts = stat_counts()
    save_stat(tmp_path / "x.pt", counts)
    loaded = read_any(tmp_path / "x.pt", model=model)
    assert isinstance(loaded, LoadCounts)
    assert np.array_equal(loaded.load_WLE, counts[:3, 1:])
    assert loaded.model.moe_layers == (1, 2, 3)
    text = " ".join(loaded.notes)
    assert "2 of 5 steps are empty" in text
    assert "dense_layer" in text
    assert "only shares are meaningful" in text


def test_stat_dumps_of_a_folder_follow_each_other(tmp_path):
    for number in range(2):
        save_stat(tmp_path / f"expert_distribution_recorder_{number}.pt", stat_counts(seed=number))
    loaded = read_sglang(tmp_path)
    assert np.array_equal(loaded.load_WLE, np.concatenate([stat_counts(seed=n)[:3, 1:] for n in range(2)]))


def test_per_pass_dumps_are_mapped_and_added_over_ranks(tmp_path):
    rng = np.random.default_rng(0)
    expected = np.zeros((3, LAYERS, EXPERTS), dtype=np.int64)
    for rank in range(2):
        records = []
        for number in (4, 7, 5):
            counts = rng.integers(0, 9, (LAYERS, PHYSICAL))
            counts[DENSE] = 0
            records.append(pass_record(torch, number, rank, counts))
            for layer in range(LAYERS):
                for slot in range(PHYSICAL):
                    expected[{4: 0, 5: 1, 7: 2}[number], layer, MAP[layer, slot]] += counts[layer, slot]
        save(torch, tmp_path / f"expert_distribution_recorder_1_{rank}.pt", records, MAP)
    loaded = read_any(tmp_path)
    assert np.array_equal(loaded.load_WLE, expected[:, 1:])
    assert any("rebalance while recording" in note for note in loaded.notes)


def test_per_token_dump_of_two_ranks(tmp_path):
    prompts = {0: [5, 3], 1: [4]}
    ids = {}
    for rank, lengths in prompts.items():
        tokens = sum(lengths)
        ids[rank] = [logical_ids(tokens, seed=rank), logical_ids(len(lengths), seed=10 + rank)]
        positions = [p for length in lengths for p in range(length)]
        records = [
            token_record(torch, 1, rank, ids[rank][0], MAP, positions, lengths, EXTEND),
            token_record(torch, 2, rank, ids[rank][1], MAP, lengths, None, DECODE),
        ]
        save(torch, tmp_path / f"expert_distribution_recorder_1_{rank}.pt", records, MAP)
    trace = read_any(tmp_path, model=MODEL)
    order = [(0, 0), (1, 0), (0, 1), (1, 1)]
    expected = np.concatenate([ids[rank][step] for rank, step in order], axis=1)[1:]
    assert np.array_equal(trace.expert_LTK, expected)
    assert trace.expert_LTK.dtype == np.uint8
    assert trace.source_rank_T.tolist() == [0] * 8 + [1] * 4 + [0, 0, 1]
    assert trace.request_id_T.tolist() == [0] * 5 + [1] * 3 + [2] * 4 + [0, 1, 2]
    assert trace.phase_T.tolist() == [0] * 12 + [1] * 3
    assert trace.position_T.tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3, 5, 3, 4]
    assert trace.token_id_T.tolist()[8:12] == [100, 101, 102, 103]
    text = " ".join(trace.notes)
    assert "request ids are inferred" in text
    guessed = read_sglang(tmp_path)
    assert guessed.model.moe_layers == (1, 2, 3)
    assert any("blank_layer" in note for note in guessed.notes)
    assert np.array_equal(guessed.expert_LTK, expected)


def test_ranks_that_recorded_the_same_tokens_are_kept_once(tmp_path):
    ids = logical_ids(6)
    ids[ids == EXPERTS - 1] = 0
    for rank in range(2):
        record = token_record(torch, 1, 0, ids, MAP, range(6), [6], EXTEND)
        save(torch, tmp_path / f"x_{rank}.pt", [{**record, "rank": rank}], MAP)
    trace = read_sglang(tmp_path, MODEL)
    assert trace.num_tokens == 6
    # an expert that no token chose is known from the map
    assert read_sglang(tmp_path).model.num_experts == EXPERTS
    assert any("6 tokens that several ranks recorded alike" in note for note in trace.notes)


def test_mixed_batches_have_prefill_and_decode_tokens(tmp_path):
    first = token_record(torch, 1, 0, logical_ids(4, seed=1), MAP, range(4), [4], EXTEND)
    mixed = token_record(torch, 2, 0, logical_ids(4, seed=2), MAP, [0, 1, 2, 4], [3, 1], MIXED)
    save(torch, tmp_path / "x.pt", [first, mixed], MAP)
    trace = read_sglang(tmp_path / "x.pt", MODEL)
    assert trace.phase_T.tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    assert trace.request_id_T.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


def test_chunked_prefill_goes_on_with_its_request():
    rank_T = np.zeros(9, np.int32)
    pass_T = np.array([1, 1, 1, 2, 2, 2, 3, 3, 4], np.int32)
    segment_T = np.array([0, 0, 0, 0, 0, 1, 0, 1, 0], np.int32)
    position_T = np.array([0, 1, 2, 3, 4, 0, 5, 1, 6], np.int32)
    assert infer_requests(rank_T, pass_T, segment_T, position_T).tolist() == [0, 0, 0, 0, 0, 1, 0, 1, 0]


@given(st.integers(0, 2**31))
@settings(max_examples=60, deadline=None)
def test_requests_of_any_schedule_are_found_where_positions_differ(seed):
    rng = np.random.default_rng(seed)
    # every request has positions of its own, so that the true answer is the only one
    requests = [{"next": 0, "left": int(rng.integers(2, 8)), "first": True} for _ in range(4)]
    rows = []
    for number in range(40):
        alive = [index for index, request in enumerate(requests) if request["left"]]
        batch = [index for index in alive if rng.random() < 0.6]
        for segment, index in enumerate(batch):
            request = requests[index]
            length = 1 + 3 * index if request["first"] else 1
            rows += [(number, segment, request["next"] + step, index) for step in range(length)]
            request["next"] += length
            request["first"] = False
            request["left"] -= 1
    pass_T, segment_T, position_T, truth_T = np.array(rows, dtype=np.int32).T
    found_T = infer_requests(np.zeros(len(rows), np.int32), pass_T, segment_T, position_T)
    # each request that was found holds consecutive positions, and as many requests are found as there were
    assert len(set(found_T.tolist())) == len(set(truth_T.tolist()))
    for request in set(found_T.tolist()):
        mine = position_T[found_T == request]
        assert mine.tolist() == list(range(len(mine)))


def good_record():
    return token_record(torch, 1, 0, logical_ids(6), MAP, range(6), [6], EXTEND)


@pytest.mark.parametrize(
    "change",
    [
        {"forward_pass_id": None},
        {"forward_pass_id": -1},
        {"forward_pass_id": 2**40},
        {"rank": "0"},
        {"forward_mode": None},
        {"positions": None},
        {"positions": [0, 1]},
        {"positions": ["a"] * 6},
        {"positions": [2**40] * 6},
        {"input_ids": [1]},
        {"extend_seq_lens": [7]},
        {"extend_seq_lens": [4, 4]},
        {"extend_seq_lens": 6},
        {"extend_seq_lens": [-1, 6]},
        {"topk_ids_of_layer": torch.full((LAYERS, 6, 8), PHYSICAL, dtype=torch.int32)},
        {"topk_ids_of_layer": torch.zeros((3, 6, 8), dtype=torch.int32)},
        {"topk_ids_of_layer": torch.zeros((LAYERS, 6), dtype=torch.int32)},
        {"topk_ids_of_layer": torch.zeros((LAYERS, 6, 8))},
        {"topk_ids_of_layer": [1]},
        {"topk_ids_of_layer": torch.full((LAYERS, 6, 8), -1, dtype=torch.int32)},
    ],
)
def test_wrong_token_records_are_named(change, tmp_path):
    save(torch, tmp_path / "x.pt", [{**good_record(), **change}], MAP)
    with pytest.raises(InputFileError, match=r"x\.pt"):
        read_sglang(tmp_path / "x.pt", MODEL)


@pytest.mark.parametrize(
    "content",
    [
        3,
        [],
        {},
        {1: 2},
        {"logical_count": torch.zeros((2, 4, 8))},
        {"logical_count": torch.zeros((4, 8), dtype=torch.int32)},
        {"logical_count": torch.zeros((0, 4, 8), dtype=torch.int32)},
        {"logical_count": torch.full((1, 4, 8), -1, dtype=torch.int32)},
        {"logical_count": torch.ones((1, 4, 8), dtype=torch.int32).to_sparse()},
        {"logical_count": torch.ones((1, 1, 1), dtype=torch.int32).expand(10**4, 10**4, 10**4)},
        {"logical_count": torch.ones((1, 4, 8), dtype=torch.bfloat16)},
        {"logical_count": torch.ones((1, 4, 8), dtype=torch.complex64)},
        {"logical_count": "many"},
        {"records": []},
        {"records": [], "last_physical_to_logical_map": torch.zeros((4, 12), dtype=torch.int64)},
        {"records": [3], "last_physical_to_logical_map": torch.zeros((4, 12), dtype=torch.int64)},
        {"records": 3, "last_physical_to_logical_map": torch.zeros((4, 12), dtype=torch.int64)},
        {"records": [], "last_physical_to_logical_map": torch.full((4, 12), 12)},
        {"records": [], "last_physical_to_logical_map": torch.full((4, 12), -1)},
        {"records": [], "last_physical_to_logical_map": torch.zeros((0, 12), dtype=torch.int64)},
        {"records": [{}], "last_physical_to_logical_map": torch.tensor(MAP)},
        {
            "records": [{"forward_pass_id": 1, "global_physical_count": torch.zeros((4, 3), dtype=torch.int32)}],
            "last_physical_to_logical_map": torch.tensor(MAP),
        },
    ],
)
def test_wrong_dumps_are_named(content, tmp_path):
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(InputFileError, match=r"x\.pt"):
        read_sglang(tmp_path / "x.pt")


def test_mixed_kinds_and_maps_are_refused(tmp_path):
    save_stat(tmp_path / "a.pt", stat_counts())
    save(torch, tmp_path / "b.pt", [good_record()], MAP)
    with pytest.raises(InputFileError, match="one kind"):
        read_sglang(tmp_path)
    save(torch, tmp_path / "a.pt", [good_record()], MAP[:, :11])
    with pytest.raises(MismatchError, match="shapes"):
        read_sglang(tmp_path)
    save(torch, tmp_path / "c.pt", [pass_record(torch, 1, 0, np.ones((LAYERS, PHYSICAL)))], MAP)
    few = ModelSpec.uniform("m", num_experts=3, top_k=2, num_hidden_layers=LAYERS)
    with pytest.raises(MismatchError, match="the model has 3"):
        read_sglang(tmp_path / "c.pt", few)


class Evil:
    def __reduce__(self):
        return (eval, ("1/0",))


def test_nothing_is_executed(tmp_path):
    torch.save({"logical_count": Evil()}, tmp_path / "x.pt")
    with pytest.raises(InputFileError, match=r"not a plain torch\.save file"):
        read_sglang(tmp_path / "x.pt")
    (tmp_path / "y.pt").write_bytes(pickle.dumps({"logical_count": [1]}))
    with pytest.raises(InputFileError, match=r"not a torch\.save file"):
        read_sglang(tmp_path / "y.pt")


def test_old_format_and_foreign_archives_are_refused(tmp_path):
    torch.save({"a": 1}, tmp_path / "x.pt", _use_new_zipfile_serialization=False)
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with zipfile.ZipFile(tmp_path / "z.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a/data.pkl", pickle.dumps({}) * 50)
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("x", "y", "z", "empty", "absent"):
        with pytest.raises(InputFileError, match=f"{name}.pt"):
            load_torch_file(tmp_path / f"{name}.pt")


def test_says_what_to_install_where_torch_is_absent(tmp_path, monkeypatch):
    save_stat(tmp_path / "x.pt", stat_counts())
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(DependencyError, match=r"placer\[torch\]"):
        read_sglang(tmp_path / "x.pt")


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damage_raises_placer_errors_or_nothing(tmp_path, data):
    path = tmp_path / "x.pt"
    if not path.exists():
        save(torch, path, [good_record()], MAP)
    content = bytearray(path.read_bytes())
    if data.draw(st.booleans()):
        content = content[: data.draw(st.integers(0, len(content) - 1))]
    for _ in range(data.draw(st.integers(0, 4)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    (tmp_path / "y.pt").write_bytes(content)
    with one_line_errors():
        read_sglang(tmp_path / "y.pt", MODEL)


@given(st.data())
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_damaged_pickles_with_right_checksums_raise_placer_errors_or_nothing(tmp_path, data):
    path = tmp_path / "x.pt"
    if not path.exists():
        save(torch, path, [good_record()], MAP)
    with zipfile.ZipFile(path) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    name = data.draw(st.sampled_from(sorted(members)))
    content = bytearray(members[name])
    for _ in range(data.draw(st.integers(1, 3)) if content else 0):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with zipfile.ZipFile(tmp_path / "y.pt", "w") as archive:
        for member, original in members.items():
            archive.writestr(member, bytes(content) if member == name else original)
    with one_line_errors():
        read_sglang(tmp_path / "y.pt", MODEL)
