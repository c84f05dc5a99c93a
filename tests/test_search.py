import pytest
import torch

from facetrain.search import group_maxima, similarity_blocks, top_k


def random_unit(num: int, width: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.nn.functional.normalize(torch.randn(num, width, generator=generator))


def test_blocks_together_are_the_whole_product() -> None:
    queries, items = random_unit(300, 24, 0), random_unit(130, 24, 1)
    blocks = list(similarity_blocks(queries, items, block_bytes=64 * 4 * 192))
    assert [(rows.start, rows.stop) for rows, _ in blocks] == [(0, 64), (64, 128), (128, 192), (192, 256), (256, 300)]
    scores = torch.cat([block for _, block in blocks])
    torch.testing.assert_close(scores.double(), queries.double() @ items.double().T, atol=1e-6, rtol=0)


@pytest.mark.parametrize("threads", [1, 2])
def test_equal_embeddings_get_equal_scores_to_the_bit(threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for num_queries, num_items, width in [(5, 2151, 512), (2, 1480, 357), (10, 1008, 507), (70, 33, 41)]:
            face = random_unit(1, width, num_items)
            ((_, scores),) = similarity_blocks(face.repeat(num_queries, 1), face.repeat(num_items, 1))
            assert scores.unique().numel() == 1
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("width", [512, 1024, 2000])
def test_scores_do_not_depend_on_the_shape_of_a_product(width: int) -> None:
    queries, items = random_unit(640, width, 8), random_unit(3000, width, 9)
    whole = torch.cat([scores for _, scores in similarity_blocks(queries, items)])
    torch.testing.assert_close(whole.double(), queries.double() @ items.double().T, atol=1e-6, rtol=0)
    for num_queries, num_items in [(1, 3000), (3, 70), (64, 64), (200, 500), (65, 3000)]:
        ((_, scores),) = similarity_blocks(queries[:num_queries], items[:num_items])
        assert torch.equal(scores, whole[:num_queries, :num_items])


def test_top_k_is_the_head_of_a_full_sort() -> None:
    queries, items = random_unit(150, 8, 2), random_unit(90, 8, 3)
    scores, rows = top_k(queries, items, 7, block_bytes=1)
    expected = (queries @ items.T).sort(dim=1, descending=True)
    torch.testing.assert_close(scores, expected.values[:, :7])
    assert torch.equal(rows, expected.indices[:, :7])


@pytest.mark.parametrize("k", [0, 91])
def test_top_k_refuses_more_than_there_is(k: int) -> None:
    with pytest.raises(ValueError, match=f"k: expected 1 to the number of items, 90, got {k}"):
        top_k(random_unit(3, 8, 2), random_unit(90, 8, 3), k)


@pytest.mark.parametrize("one_each", [False, True])
def test_group_maxima_are_the_best_of_each_group(one_each: bool) -> None:
    queries, items = random_unit(100, 8, 4), random_unit(50, 8, 5)
    groups = torch.arange(50) if one_each else torch.arange(50) * 7 % 11
    num_groups = int(groups.max()) + 1
    maxima = torch.cat([block for _, block in group_maxima(queries, items, groups, num_groups, block_bytes=1)])
    scores = queries @ items.T
    expected = torch.stack([scores[:, groups == group].amax(dim=1) for group in range(num_groups)], dim=1)
    torch.testing.assert_close(maxima, expected)


def test_a_group_without_items_scores_below_everything() -> None:
    ((_, maxima),) = group_maxima(random_unit(2, 8, 4), random_unit(3, 8, 5), torch.tensor([0, 0, 2]), 3)
    assert torch.equal(maxima[:, 1], torch.full((2,), -torch.inf))


def test_products_are_float32_whatever_the_process_has_set() -> None:
    queries, items = random_unit(200, 256, 6), random_unit(200, 256, 7)
    ((_, expected),) = similarity_blocks(queries, items)
    torch.set_float32_matmul_precision("medium")
    try:
        with torch.autocast("cpu", torch.bfloat16):
            ((_, scores),) = similarity_blocks(queries, items)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    assert scores.dtype == torch.float32
    assert torch.equal(scores, expected)
