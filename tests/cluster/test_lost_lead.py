"""A shard whose connection to the lead breaks says so, and says when it has the lead again."""

from pathlib import Path

from tests.support.jobs import ready, start_server, until
from tests.support.proxy import Proxy
from torch_ps.common.options.server_config import ServerConfig


def test_shard_that_has_lost_the_lead_says_when_it_has_found_it_again(tmp_path: Path) -> None:
    def config(shard: int, lead: str = "") -> ServerConfig:
        file = str(tmp_path / f"ready{shard}")
        return ServerConfig(listen="127.0.0.1:0", shard=f"{shard}/2", lead=lead, metrics="127.0.0.1:0", ready_file=file)

    lead = start_server(config(0), tmp_path / "lead")
    try:
        with Proxy(ready(lead, tmp_path / "ready0")["servers"][0]) as proxy:
            other = start_server(config(1, proxy.address), tmp_path / "other")
            try:
                ready(other, tmp_path / "ready1")
                assert "lost the lead" not in other.output

                def noticed() -> bool:
                    proxy.sever()  # again, as the shard may not have been connected yet
                    return "lost the lead" in other.output

                until(noticed, "the shard notices")
                until(lambda: "found the lead again, at 127.0.0.1:" in other.output, "the shard has it again")
            finally:
                other.kill()
    finally:
        lead.kill()
