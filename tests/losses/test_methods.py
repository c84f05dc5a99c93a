"""Each loss is its formula, written down face by face, and its gradient is that of its value."""

from dataclasses import replace

import pytest
import torch
from losses import formulas
from torch.utils.checkpoint import checkpoint

from facetrain.config import LossConfig, TrainConfig
from facetrain.config.loss_parameters import (
    AngularConfig,
    ArcFaceConfig,
    ContrastiveConfig,
    GroupConfig,
    ProxyNcaConfig,
    RankedListConfig,
    TripletConfig,
)
from facetrain.losses.build import build_loss, check_loss
from facetrain.losses.classes import cosine_with_margin
from facetrain.losses.group import draw_anchors
from facetrain.losses.library import random_triplets
from facetrain.world import World

WIDTH, SEED, STEP = 5, 3, 7
IDENTITIES = torch.tensor([2, 3, 5, 7, 11, 13, 17, 19, 23])
LABELS = {
    "distinct": torch.tensor([3, 5, 7, 11, 19, 23]),
    "four images each": torch.tensor([3, 3, 7, 7, 19, 19]),
}
OURS = [
    LossConfig(name="angular"),
    LossConfig(name="angular", angular=AngularConfig(angle_deg=36, negatives="positives")),
    LossConfig(name="npair-angular", angular=AngularConfig(weight=0.7)),
    LossConfig(name="softmax"),
    LossConfig(name="arcface", arcface=ArcFaceConfig(scale=6)),
    LossConfig(name="arcface", arcface=ArcFaceConfig(scale=6, margin_rad=1.4)),
    LossConfig(name="proxy-nca", proxy_nca=ProxyNcaConfig(scale=3)),
    LossConfig(name="proxy-nca", proxy_nca=ProxyNcaConfig(own_in_denominator=True)),
    LossConfig(name="group"),
    LossConfig(name="group", group=GroupConfig(iterations=3, temperature=2)),
    LossConfig(name="group", group=GroupConfig(anchors=0)),
]
LIBRARY = [
    LossConfig(name="contrastive", contrastive=ContrastiveConfig(margin=1.3)),
    LossConfig(name="triplet", triplet=TripletConfig(mining="random")),
    LossConfig(name="triplet", triplet=TripletConfig(mining="semi-hard", margin=0.6)),
    LossConfig(name="triplet", triplet=TripletConfig(mining="batch-hard")),
    LossConfig(name="lifted"),
    LossConfig(name="ranked-list"),
    LossConfig(name="ranked-list", ranked_list=RankedListConfig(negative_share=0.8, temperature=0)),
    LossConfig(name="multi-similarity"),
]


def make_loss(config):
    config = replace(config, l2_weight=0.01)
    identities = IDENTITIES.numpy()
    loss = build_loss(config, TrainConfig(), World(), identities=identities, embedding_dim=WIDTH, seed=SEED)
    if loss.class_vectors is not None:
        loss.class_vectors.rows_cD = loss.class_vectors.rows_cD.detach().double().requires_grad_()
    return loss


def name_of(case):
    return case.name


def pairs():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2, 6, WIDTH, dtype=torch.float64, generator=generator).requires_grad_()


def by_the_formula(loss, anchors, positives, labels):
    config, name = loss.config, loss.config.name
    faces, doubled = torch.stack([anchors, positives], 1).flatten(0, 1), labels.repeat_interleave(2)
    if name in ("angular", "npair-angular"):
        how = {"angle_deg": config.angular.angle_deg, "negatives": config.angular.negatives}
        value = formulas.angular(anchors, positives, labels, **how)
        if name == "npair-angular":
            value = formulas.npair_mc(anchors, positives, labels) + config.angular.weight * value
        return value
    if loss.class_vectors is not None:
        vectors, classes = loss.class_vectors.rows_cD, [IDENTITIES.tolist().index(y) for y in doubled.tolist()]
        settings = {} if name == "softmax" else vars(getattr(config, name.replace("-", "_"))).copy()
        if name == "group":
            settings["is_anchor"] = draw_anchors(doubled, settings.pop("anchors"), seed=SEED, step=STEP)
        return getattr(formulas, name.replace("-", "_"))(faces, classes, vectors, **settings)
    if name == "triplet":
        chosen = {
            "random": lambda: torch.stack(random_triplets(doubled, seed=SEED, step=STEP), dim=1).tolist(),
            "semi-hard": lambda: formulas.semi_hard(faces, doubled, margin=config.triplet.margin),
            "batch-hard": lambda: formulas.batch_hard(faces, doubled),
        }[config.triplet.mining]()
        return formulas.triplets(faces, doubled, chosen, margin=config.triplet.margin)
    settings = vars(getattr(config, name.replace("-", "_")))
    return getattr(formulas, name.replace("-", "_"))(faces, doubled, **settings)


@pytest.mark.parametrize("case", OURS + LIBRARY, ids=name_of)
@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
def test_a_loss_and_its_gradient_are_those_of_its_formula(case, labels):
    faces = pairs()
    loss = make_loss(case)
    value = loss(*faces, labels, step=STEP)
    expected = by_the_formula(loss, *faces, labels)
    torch.testing.assert_close(value.data, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(value.total.detach(), value.data + 0.01 * value.squared_norm)
    total = expected + 0.01 * faces.square().sum() / 12
    wanted = [faces] + ([loss.class_vectors.rows_cD] if loss.class_vectors else [])
    for got, gradient in zip(torch.autograd.grad(value.total, wanted), torch.autograd.grad(total, wanted), strict=True):
        torch.testing.assert_close(got, gradient, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("case", OURS, ids=name_of)
def test_ours_pass_gradcheck(case):
    loss = make_loss(case)
    vectors = [loss.class_vectors.rows_cD] if loss.class_vectors else []

    def total(faces, *vectors):
        if vectors:
            loss.class_vectors.rows_cD = vectors[0]
        return loss(*faces, LABELS["four images each"], step=STEP).total

    def recomputed(*inputs):  # gradcheck goes backward more than once, and the graph of sum_of_rows serves one time
        return checkpoint(total, *inputs, use_reentrant=False)

    assert torch.autograd.gradcheck(recomputed, (pairs(), *vectors))


@pytest.mark.parametrize("case", [OURS[3], OURS[4], OURS[8]], ids=name_of)
def test_tiles_of_classes_change_nothing(case):
    outcomes = []
    for tile_bytes in (1 << 20, 2 * 12 * 8, 1):
        faces, loss = pairs(), make_loss(replace(case, tile_bytes=tile_bytes))
        total = loss(*faces, LABELS["distinct"], step=STEP).total
        outcomes.append([total.detach(), *torch.autograd.grad(total, [faces, loss.class_vectors.rows_cD])])
    for tiled in outcomes[1:]:
        for got, expected in zip(tiled, outcomes[0], strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)


def test_softmax_keeps_its_gradient_at_a_small_loss():
    loss = make_loss(LossConfig(name="softmax"))
    vectors = 12 * torch.eye(9, WIDTH, dtype=torch.float64)[:, :WIDTH]
    vectors[5:] = -vectors[:4]
    gradients = []
    for dtype in (torch.float64, torch.float32):
        loss.class_vectors.rows_cD = vectors.to(dtype, copy=True).requires_grad_()
        faces = (0.2 * vectors[[0, 1]]).to(dtype, copy=True)
        value = loss(faces, faces, IDENTITIES[[0, 1]])
        gradients.append(torch.autograd.grad(value.total, loss.class_vectors.rows_cD)[0].double())
    assert value.data < 1e-6
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_arcface_has_a_finite_gradient_where_a_face_lies_on_its_class_and_falls_beyond_pi():
    cosines = torch.tensor([1.0, -1.0, -0.95, 0.3], dtype=torch.float64, requires_grad=True)
    with_margin = cosine_with_margin(cosines, 0.5)
    (gradient,) = torch.autograd.grad(with_margin.sum(), cosines)
    assert gradient.isfinite().all()
    falling = cosine_with_margin(torch.linspace(1, -1, 1001), 0.5).diff()
    assert (falling < 0).all()


def test_a_constant_embedding_leaves_the_group_loss_finite():
    with torch.no_grad():
        faces = pairs()
        faces[0, 2], faces[1, 4] = 0.0, 0.3
    loss = make_loss(LossConfig(name="group", group=GroupConfig(anchors=0)))
    value = loss(*faces.requires_grad_(), LABELS["distinct"], step=STEP)
    gradients = torch.autograd.grad(value.total, [faces, loss.class_vectors.rows_cD])
    assert value.data.isfinite()
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("name", ["contrastive", "lifted"])
def test_faces_of_one_person_that_nearly_coincide_keep_their_gradient(name):
    generator = torch.Generator().manual_seed(2)
    anchors = torch.randn(40, WIDTH, dtype=torch.float64, generator=generator)
    positives = anchors + 1e-3 * torch.randn(40, WIDTH, dtype=torch.float64, generator=generator)
    loss, gradients = make_loss(LossConfig(name=name)), []
    for dtype in (torch.float64, torch.float32):
        faces = torch.stack([anchors, positives]).to(dtype).requires_grad_()
        value = loss(*faces, torch.arange(40))
        gradients.append(torch.autograd.grad(value.total, faces)[0].double())
    assert (gradients[1] - gradients[0]).norm() < 1e-3 * gradients[0].norm()


def test_proxy_nca_with_the_own_proxy_is_the_librarys():
    from pytorch_metric_learning.losses import ProxyNCALoss

    loss = make_loss(LossConfig(name="proxy-nca", proxy_nca=ProxyNcaConfig(own_in_denominator=True, scale=3)))
    anchors, positives = pairs()
    theirs = ProxyNCALoss(len(IDENTITIES), WIDTH, softmax_scale=3)
    theirs.proxies.data = loss.class_vectors.rows_cD.detach().float()
    faces = torch.cat([anchors, positives])
    classes = torch.searchsorted(IDENTITIES, LABELS["distinct"].repeat(2))
    value = loss(anchors, positives, LABELS["distinct"])
    torch.testing.assert_close(value.data.float(), theirs(faces.float(), classes).detach())


@pytest.mark.parametrize(("identities", "ranks"), [(3, 4), (1, 1)])
def test_class_vectors_need_an_identity_for_each_rank_and_two(identities, ranks):
    with pytest.raises(ValueError, match=rf"as many trained identities as processes, and two, got {identities}"):
        check_loss(LossConfig(name="softmax"), num_identities=identities, world_size=ranks)


def test_what_a_loss_draws_depends_on_seed_and_step():
    labels_M = torch.arange(40).repeat_interleave(4)

    def drawn(seed, step):
        triplets = torch.cat(random_triplets(labels_M, seed=seed, step=step))
        return triplets.tolist(), draw_anchors(labels_M, 2, seed=seed, step=step).tolist()

    for i in range(2):
        assert drawn(1, 5)[i] == drawn(1, 5)[i]
        assert drawn(1, 5)[i] != drawn(2, 5)[i]
        assert drawn(1, 5)[i] != drawn(1, 6)[i]
