"""The stages around the model family as one package, and the command `periln`.

An installed copy has the sub-packages in this folder. In a checkout they are the folders next to it: `periln.eval` is
`eval/`, `periln.runkit` is `runkit/`.
"""

from pathlib import Path

_FOLDER = Path(__file__).resolve().parent
IS_CHECKOUT = not (_FOLDER / "runkit").is_dir()
if IS_CHECKOUT:
    __path__.append(str(_FOLDER.parent))
