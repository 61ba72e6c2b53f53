"""The scenes world: captioned images of coloured shapes, and a verifier that recognises their content from pixels."""
