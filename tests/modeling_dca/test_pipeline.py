"""Stages of a pipeline compute, train and are saved as the model in one process."""

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe, ScheduleInterleaved1F1B

from modeling_dca import DCAForCausalLM
from modeling_dca.pipeline import share_of_blocks
from tests.modeling_dca.test_parallel import STEPS, batch, build_model, train, two_processes


FULL, STANDARD = {"last_k": None}, {"residual_scheme": "standard", "last_k": None}
TIED = {"tie_word_embeddings": True}

# A pipeline of two processes: the schedule, how many stages each has, and the model. (What the stages need not know of one
# another, such as positions, is tested without processes.)
PIPELINES = {
    "GPipe, full": (ScheduleGPipe, 1, FULL),
    "GPipe, k = 2, tied": (ScheduleGPipe, 1, {"last_k": 2, **TIED}),
    "GPipe, standard": (ScheduleGPipe, 1, STANDARD),
    "1F1B, full, tied": (Schedule1F1B, 1, {**FULL, **TIED}),
    "1F1B, k = 2": (Schedule1F1B, 1, {"last_k": 2}),
    "1F1B, k = 2, checkpointing": (Schedule1F1B, 1, {"last_k": 2, "num_hidden_layers": 7}),
    "1F1B, standard, tied": (Schedule1F1B, 1, {**STANDARD, **TIED}),
    "interleaved 1F1B, k = 1, tied": (ScheduleInterleaved1F1B, 2, {"last_k": 1, **TIED}),
}


def train_in_pipelines(rank, folder):
    for name, (schedule, each, options) in PIPELINES.items():
        model = build_model(**options).train()
        if "checkpointing" in name:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        indices = [rank + 2 * i for i in range(each)]
        stages = torch.nn.ModuleList(model.pipeline_stage(index, 2 * each) for index in indices)
        parts = [PipelineStage(stage, i, 2 * each, torch.device("cpu")) for stage, i in zip(stages, indices)]

        def loss(logits, labels, model=model):
            return model.loss_function(logits, labels, model.config.vocab_size)

        steps = schedule(parts if each > 1 else parts[0], n_microbatches=4, loss_fn=loss)
        optimizer = torch.optim.SGD(stages.parameters(), lr=0.5)
        for _ in range(STEPS):
            steps.step(*([batch()] if rank == 0 else []), target=batch() if rank == 1 else None)
            for stage in stages:
                stage.sum_tied_gradients()
            optimizer.step()
            optimizer.zero_grad()
        dcp.save(
            {key: value for stage in stages for key, value in stage.state_dict().items()},
            checkpoint_id=f"{folder}/{name}",
        )


def test_pipelines_of_two_processes_train_as_one_process(tmp_path):
    two_processes(train_in_pipelines, tmp_path)
    for name, (_, _, options) in PIPELINES.items():
        model = build_model(**options).train()
        start = {key: value.clone() for key, value in model.state_dict().items()}
        expected = train(model, batch(), model)

        state = {key: torch.empty_like(value) for key, value in start.items()}
        dcp.load(state, checkpoint_id=tmp_path / name)
        if model.config.tie_word_embeddings:
            assert torch.equal(state["lm_head.weight"], state["model.embed_tokens.weight"]), name
        whole = build_model(**options)
        whole.load_state_dict(state)
        whole.save_pretrained(tmp_path / f"{name}, whole")

        trained = dict(DCAForCausalLM.from_pretrained(tmp_path / f"{name}, whole").named_parameters())
        assert trained.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(trained[key], value, rtol=1e-4, atol=3e-6, msg=f"{name}: {key}")
            assert not torch.equal(trained[key], start[key]), (name, key)


def stages_of(model, count):
    return [model.pipeline_stage(index, count) for index in range(count)]


def run(stages, input_ids, **options):
    passed = input_ids
    for stage in stages:
        passed = stage(*(passed if isinstance(passed, tuple) else (passed,)), **options)
    return passed


MODELS = {
    "k = 2": {"last_k": 2},
    "sliding windows": {"sliding_window": 3, "num_hidden_layers": 5},
    "learned positions": {"position_embedding": "learned", **FULL},
    "sincos positions, GRN-v2": {"position_embedding": "sincos", "residual_scheme": "grn_v2"},
    "scaled and capped logits, tied": {
        "logit_multiplier": 0.5,
        "logit_softcap": 2.0,
        "embedding_multiplier": 3.0,
        **TIED,
    },
    "standard": STANDARD,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("count", [1, 2, 4])
def test_stages_compute_what_the_model_does(name, count):
    model = build_model(**MODELS[name]).eval()
    mask = torch.ones(4, 8, dtype=torch.long)
    mask[0, :3] = 0
    for options in ({}, {"attention_mask": mask}, {"position_ids": torch.arange(2, 10).expand(4, 8)}):
        expected = model(input_ids=batch(), **options).logits
        logits = run(stages_of(model, count), batch(), **options)
        assert torch.equal(logits, expected)
        expected_grads = torch.autograd.grad(expected.square().sum(), list(model.parameters()))
        for grad, wanted in zip(torch.autograd.grad(logits.square().sum(), list(model.parameters())), expected_grads):
            torch.testing.assert_close(grad, wanted)


@pytest.mark.parametrize(("last_k", "most"), [(None, 9), (1, 3), (2, 4), (7, 9)])
def test_no_more_is_passed_than_the_next_stages_need(last_k, most):
    model = build_model(num_hidden_layers=8, last_k=last_k)
    for count in (2, 3, 8):
        passed = batch()
        for index, stage in enumerate(stages_of(model, count)[:-1]):
            passed = stage(*(passed if isinstance(passed, tuple) else (passed,)))
            blocks = share_of_blocks(8, index, count).stop
            assert len(passed) == min(blocks + 1, most)
            assert all(entry.shape == (4, 8, 16) for entry in passed)
    passed = build_model(**STANDARD).pipeline_stage(0, 2)(batch())
    assert passed.shape == (4, 8, 16)


@pytest.mark.parametrize("num_blocks", [1, 4, 7, 12])
def test_every_block_is_in_one_stage_and_all_have_as_many(num_blocks):
    for count in range(1, num_blocks + 1):
        shares = [share_of_blocks(num_blocks, index, count) for index in range(count)]
        assert [block for share in shares for block in share] == list(range(num_blocks))
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1 and sizes[0] == max(sizes)


def test_the_states_of_all_stages_are_that_of_the_model():
    model = build_model(last_k=2, num_hidden_layers=5)
    states = [stage.state_dict() for stage in stages_of(model, 3)]
    assert sum(map(len, states)) == len(model.state_dict())
    assert {key for state in states for key in state} == model.state_dict().keys()
    assert all(
        value.data_ptr() == model.state_dict()[key].data_ptr() for state in states for key, value in state.items()
    )


def test_the_code_goes_with_a_checkpoint(tmp_path):
    build_model().save_pretrained(tmp_path)
    assert {"pipeline.py", "sharding.py", "sums.py"} <= {file.name for file in tmp_path.iterdir()}


def test_the_model_is_as_it_was():
    model = build_model().eval()
    before = model(input_ids=batch()).logits
    stages = stages_of(model, 2)
    assert torch.equal(model(input_ids=batch()).logits, before)
    assert not any(stage.training for stage in stages)


def test_tied_weights_that_are_changed_alone_are_an_error():
    # Two processes have weights of their own.
    first, last = build_model(**TIED).pipeline_stage(0, 2), build_model(**TIED).pipeline_stage(1, 2)
    optimizer = torch.optim.SGD(first.parameters(), lr=0.5)
    run([first, last], batch()).square().mean().backward()
    run([first, last], batch())  # another micro-batch
    first.sum_tied_gradients()
    optimizer.step()
    run([first, last], batch()).square().mean().backward()
    optimizer.step()
    with pytest.raises(
        RuntimeError, match=r"updated with the gradients of only one .*: call `stage.sum_tied_gradients\(\)`"
    ):
        first(batch())


def test_frozen_tied_embeddings_need_no_sum():
    model = build_model(**TIED)
    model.freeze_backbone()
    first, last = stages_of(model, 2)
    run([first, last], batch()).square().mean().backward()
    first.sum_tied_gradients()
    assert first.model.embed_tokens.weight.grad is None


@pytest.mark.parametrize(
    ("index", "count", "message"),
    [
        (0, 5, "`count` is 5; a model of 4 blocks can have from 1 to 4 stages"),
        (0, 0, "`count` is 0; a model of 4 blocks can have from 1 to 4 stages"),
        (2, 2, "`index` is 2; with 2 stages it must be from 0 to 1"),
        (-1, 2, "`index` is -1; with 2 stages it must be from 0 to 1"),
    ],
)
def test_stages_that_are_not_are_refused(index, count, message):
    with pytest.raises(ValueError, match=message):
        build_model().pipeline_stage(index, count)
