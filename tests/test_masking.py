import pytest

from facetrain.masking import mask_secrets


@pytest.mark.parametrize(
    ("text", "masked"),
    [
        ("https://me:pa55@host:5000/x", "https://***@host:5000/x"),
        ("http://store/a.tar?X-Amz-Signature=ab12&part=1", "http://store/a.tar?X-Amz-Signature=***&part=1"),
        ("https://store/a.tar?sv=1&sig=ab%2F12&se=2", "https://store/a.tar?sv=1&sig=***&se=2"),
        ("pipe:curl -H 'Authorization: Bearer abc.def-123' u", "pipe:curl -H 'Authorization: Bearer ***' u"),
        ("AWS_SECRET_ACCESS_KEY=abc/def+1 run", "AWS_SECRET_ACCESS_KEY=*** run"),
        ('api_key: "k-123"', 'api_key: "***"'),
        ("MLFLOW_TRACKING_TOKEN = t", "MLFLOW_TRACKING_TOKEN = ***"),
        ("shards: shards/faces\nseed: 0", "shards: shards/faces\nseed: 0"),
        ("s3://bucket/faces", "s3://bucket/faces"),
        ("basic training of a network", "basic training of a network"),
    ],
)
def test_what_looks_like_a_secret_is_masked_and_nothing_else(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked
