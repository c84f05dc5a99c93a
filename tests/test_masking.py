import pytest
import yaml

from facetrain.command_line import config_yaml
from facetrain.config import Config, DataConfig
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
        ("https://me:p@55@w0rd@host/x@y", "https://***@host/x@y"),
        ("curl -u bob:hunter2 http://host", "curl -u *** http://host"),
        ("curl -u 'bob:my words' http://host", "curl -u '***' http://host"),
        ("curl --user bob:pw --proxy-user=bob:pw u", "curl --user *** --proxy-user=*** u"),
        ("['curl', '-u', 'bob:pw']", "['curl', '-u', '***']"),
        ("mysql --password hunter2 --verbose", "mysql --password *** --verbose"),
        ("s3cmd --secret-access-key=abcdef x", "s3cmd --secret-access-key=*** x"),
        ("['--token', 'abc', 'x']", "['--token', '***', 'x']"),
        ("curl -H 'Authorization: token ghp_abc' u", "curl -H 'Authorization: token ***' u"),
        ('curl -H "authorization: AWS4 a=b, c=d" u', 'curl -H "authorization: ***" u'),
        ('-H \'Authorization: Digest a="b", c="d"\' u', "-H 'Authorization: Digest ***' u"),
        ("Authorization: token ghp_abc def\nHost: x", "Authorization: token ***\nHost: x"),
        ('{"Authorization": "Basic YTpi", "Host": "x"}', '{"Authorization": "Basic ***", "Host": "x"}'),
        ("-H 'Proxy-Authorization: Basic YTpi' u", "-H 'Proxy-Authorization: Basic ***' u"),
        ("password: 'my secret words' user: 1", "password: '***' user: 1"),
        ('"secret": "a \\" b" c', '"secret": "***" c'),
        ("python -u train.py --user bob", "python -u train.py --user bob"),
        ("mlflow ui -u http://host:5000/x", "mlflow ui -u http://host:5000/x"),
        ("--password --verbose", "--password --verbose"),
        ("max-token length", "max-token length"),
        ("shards: shards/faces\nseed: 0", "shards: shards/faces\nseed: 0"),
        ("s3://bucket/faces", "s3://bucket/faces"),
        ("basic training of a network", "basic training of a network"),
    ],
)
def test_what_looks_like_a_secret_is_masked_and_nothing_else(text: str, masked: str) -> None:
    assert mask_secrets(text) == masked


def test_secrets_of_a_config_are_masked_however_long_its_lines_are() -> None:
    for length in range(100):
        shards = f"pipe:{'x' * length} --password hunter2 -u bob:hunter2 http://host/{{name}}"
        config = Config(data=DataConfig(shards=shards, cache_dir="cache"))
        assert "hunter2" not in mask_secrets(config_yaml(config)), length


@pytest.mark.parametrize(
    "command",
    [
        "curl -H 'Accept: a' -u 'bob:hunter2' u",  # with ': ' in it YAML writes '' for each '
        "curl -H 'Accept: a' --user='bob:hunter2' u",
        "PASSWORD='my secret words hunter2' curl -H 'Accept: a' u",
        'curl \u00e9 -u "bob:hunter2" u',  # with a letter that isn't ASCII \" for each "
        'curl \u00e9 --token "hunter2 hunter2" u',
        'curl \u00e9 -H "Authorization: Basic hunter2 hunter2" u',
    ],
)
def test_secrets_of_a_config_are_masked_in_whatever_quotes_they_are(command: str) -> None:
    masked = mask_secrets(config_yaml(Config(data=DataConfig(shards=f"pipe:{command}/{{name}}", cache_dir="cache"))))
    assert "hunter2" not in masked
    assert yaml.safe_load(masked)["data"]["shards"].endswith("u/{name}")
