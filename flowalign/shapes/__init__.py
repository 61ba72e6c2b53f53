"""The scenes world: captioned pictures of coloured shapes, and a verifier that reads them back from pixels."""
