"""Text corpora, tokenizers, batches, and the associative-recall task."""

from nl_models.data.associative_recall import AssociativeRecall, recall_accuracy
from nl_models.data.batches import DocumentStreams, TrainingBatches, validation_windows
from nl_models.data.corpus import CorpusError, Document, read_folder, read_standard_library, split_by_file
from nl_models.data.prepare import DataOptions, PreparedData, prepare_data
from nl_models.data.tokenizer import BytePairTokenizer, ByteTokenizer, load_tokenizer, train_bpe

__all__ = [
    "AssociativeRecall",
    "BytePairTokenizer",
    "ByteTokenizer",
    "CorpusError",
    "DataOptions",
    "Document",
    "DocumentStreams",
    "PreparedData",
    "TrainingBatches",
    "load_tokenizer",
    "prepare_data",
    "read_folder",
    "read_standard_library",
    "recall_accuracy",
    "split_by_file",
    "train_bpe",
    "validation_windows",
]
