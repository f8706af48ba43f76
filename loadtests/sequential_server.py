"""A plain gRPC server that runs hand-written PyTorch on one request at a time.

    python -m loadtests.sequential_server BACKBONE DICTIONARY PORT

It answers FeatureService.ExtractFeatures for one text and one TopK dictionary, without batching, selection or limits.
The benchmark compares the service with it. It listens on 127.0.0.1.
"""

import argparse
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import torch
from tokenizers import Tokenizer

from loadtests.bare import BareExtractor
from sae_runtime.dictionary.formats.published import read_manifest
from service.arrays import pack_sparse_rows
from service.pb.saeserve.v1 import feature_service_pb2 as pb
from service.pb.saeserve.v1.feature_service_pb2_grpc import FeatureServiceServicer, add_FeatureServiceServicer_to_server


class SequentialServer(FeatureServiceServicer):
    """Answers one request after the other, in one thread."""

    def __init__(self, extractor: BareExtractor, tokenizer: Tokenizer, dictionary: str) -> None:
        self.extractor, self.tokenizer, self.dictionary = extractor, tokenizer, dictionary

    def ExtractFeatures(
        self, request: pb.ExtractFeaturesRequest, context: grpc.ServicerContext
    ) -> pb.ExtractFeaturesResponse:
        ids = self.tokenizer.encode(request.inputs[0].text).ids
        values, indices = self.extractor.extract([ids])
        fires = values > 0
        splits = torch.nn.functional.pad(fires.sum(1).cumsum(0), (1, 0))
        rows = pack_sparse_rows(splits.numpy(), indices[fires].numpy(), values[fires].numpy())
        features = pb.DictionaryFeatures(dictionary=self.dictionary, features=rows)
        return pb.ExtractFeaturesResponse(results=[pb.InputFeatures(n_tokens=len(ids), dictionaries=[features])])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbone", type=Path, help="Hugging Face folder with tokenizer.json")
    parser.add_argument("dictionary", type=Path, help="published dictionary")
    parser.add_argument("port", type=int)
    arguments = parser.parse_args()
    extractor = BareExtractor(arguments.backbone, arguments.dictionary)
    tokenizer = Tokenizer.from_file(str(arguments.backbone / "tokenizer.json"))
    server = grpc.server(ThreadPoolExecutor(max_workers=1))
    handlers = SequentialServer(extractor, tokenizer, read_manifest(arguments.dictionary).name)
    add_FeatureServiceServicer_to_server(handlers, server)
    server.add_insecure_port(f"127.0.0.1:{arguments.port}")
    server.start()
    server.wait_for_termination()


if __name__ == "__main__":
    main()
