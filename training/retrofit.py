"""
Convert a trained residual model to a DCA model that computes the same: `python -m training.retrofit SOURCE OUTPUT`.

The folder OUTPUT is always complete: the checkpoint is written and verified under another name next to it, and then renamed.
"""

import sys
from pathlib import Path

import transformers
from huggingface_hub.utils import disable_progress_bars

from modeling_dca.configuration_dca import RESIDUAL_SCHEMES
from training.results.conversion import MODEL_CLASSES, retrofit
from training.support.errors import command
from training.support.parser import Parser


@command
def main():
    parser = Parser(None, "training.retrofit", __doc__, allow_abbrev=True)
    parser.add_argument("source", metavar="SOURCE", help="a language or vision model: path, Hub id or GGUF file")
    parser.add_argument("output", metavar="OUTPUT", type=Path, help="the folder of the DCA checkpoint")
    heads = dict.fromkeys(name for model_classes in MODEL_CLASSES.values() for name in model_classes)
    parser.add_argument("--head", choices=[*heads], help="the head of the DCA model (default: that of the source)")
    parser.add_argument("--num_labels", type=int, help="number of labels of the head; another number gives a new head")
    parser.add_argument("--gguf_file", help="the name of a GGUF file in the folder or repository SOURCE")
    parser.add_argument("--last_k", type=int, help="the k of k-DCA (default: full DCA)")
    parser.add_argument("--residual_scheme", help=f"one of {', '.join(RESIDUAL_SCHEMES)} (default: dca)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="default: that of the source")
    parser.add_argument("--revision", help="branch, tag or commit of a source on the Hub")
    parser.add_argument("--subfolder", help="the folder of the model in a repository on the Hub")
    parser.add_argument("--variant", help="load the files of weights with this in their names, such as fp16")
    parser.add_argument("--max_shard_size", default="50GB", help="size of a file of weights (default: %(default)s)")
    parser.add_argument("--verify", action="store_true", help="compare the results of both models in float32")
    parser.add_argument("--text", help="the text to compare them on (default: random tokens or images)")
    parser.add_argument("--overwrite", action="store_true", help="replace the checkpoint that OUTPUT holds")
    arguments = parser.parse_args()
    if not sys.stderr.isatty():
        disable_progress_bars()
        transformers.utils.logging.disable_progress_bar()
    retrofit(arguments)


if __name__ == "__main__":
    main()
