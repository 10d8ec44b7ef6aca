"""Terms, configurations and votes as protobuf messages; ``torch_ps.common.wire.terms`` defines them."""

from torch_ps.common.pb import parameter_server_pb2 as pb
from torch_ps.common.wire.terms import Configuration, Term, Vote


def term_to_proto(term: Term) -> pb.Term:
    return pb.Term(number=term.number, server=term.server)


def term_from_proto(message: pb.Term) -> Term:
    return Term(message.number, message.server)


def configuration_to_proto(configuration: Configuration) -> pb.Configuration:
    return pb.Configuration(term=term_to_proto(configuration.term), standby=configuration.standby)


def configuration_from_proto(message: pb.Configuration) -> Configuration:
    return Configuration(term_from_proto(message.term), message.standby)


def vote_to_proto(vote: Vote) -> pb.Vote:
    return pb.Vote(
        term=term_to_proto(vote.term),
        granted=vote.granted,
        promised=term_to_proto(vote.promised),
        served=configuration_to_proto(vote.served),
    )


def vote_from_proto(message: pb.Vote) -> Vote:
    return Vote(
        term_from_proto(message.term),
        message.granted,
        term_from_proto(message.promised),
        configuration_from_proto(message.served),
    )


def address_of(server: str) -> str:
    """The address in the name of a server, "host:port/random"."""
    return server.partition("/")[0]
