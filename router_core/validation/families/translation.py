"""Translate single words and short phrases."""

from __future__ import annotations

from collections.abc import Iterator
from random import Random

from router_core.validation.families.helpers import Draft, Section
from router_core.validation.graders import ContainsGrader, Terms

_LANGUAGES = ("English", "French", "German", "Spanish", "Italian", "Portuguese")

_WORDS = """
1 house maison Haus casa casa casa
1 water eau Wasser agua acqua água
1 dog chien Hund perro cane cão/cachorro
1 bread pain Brot pan pane pão
1 night nuit Nacht noche notte noite
1 friend ami/amie Freund/Freundin amigo/amiga amico/amica amigo/amiga
1 milk lait Milch leche latte leite
1 red rouge rot rojo/roja rosso/rossa vermelho/vermelha
1 book livre Buch libro libro livro
2 window fenêtre Fenster ventana finestra janela
2 key clé/clef Schlüssel llave chiave chave
2 bridge pont Brücke puente ponte ponte
2 butterfly papillon Schmetterling mariposa farfalla borboleta
2 spoon cuillère/cuiller Löffel cuchara cucchiaio colher
2 kitchen cuisine Küche cocina cucina cozinha
2 shoulder épaule Schulter hombro spalla ombro
2 neighbour voisin/voisine Nachbar/Nachbarin vecino/vecina vicino/vicina vizinho/vizinha
2 thunder tonnerre Donner trueno tuono trovão
3 hedgehog hérisson Igel erizo riccio ouriço/ouriço-cacheiro
3 sneeze éternuer niesen estornudar starnutire espirrar
3 thimble dé Fingerhut dedal ditale dedal
3 scaffold échafaudage Gerüst andamio impalcatura/ponteggio andaime
3 loyalty loyauté/fidélité Treue/Loyalität lealtad/fidelidad lealtà/fedeltà lealdade/fidelidade
3 anvil enclume Amboss yunque incudine bigorna
3 drought sécheresse Dürre/Trockenheit sequía siccità seca/estiagem
"""

_FRAMES = (
    "Translate the {source} word '{word}' into {target}.",
    "What is the {target} word for '{word}' ({source})?",
    "How do you say '{word}' in {target}? It is a {source} word. One word is enough.",
    "{source} to {target}: {word}",
)


def _translations(rng: Random) -> Iterator[Draft]:
    """Translate from or into English at levels 1 and 2, and also between two other languages at level 3."""
    rows = [line.split() for line in _WORDS.strip().splitlines()]
    while True:
        for level_text, *cells in rng.sample(rows, len(rows)):
            level = int(level_text)
            source, target = rng.sample(range(len(_LANGUAGES)), 2)
            if level < 3 and 0 not in (source, target):
                source = 0
            word, answers = cells[source].split("/")[0], tuple(cells[target].split("/"))
            text = rng.choice(_FRAMES).format(source=_LANGUAGES[source], target=_LANGUAGES[target], word=word)
            yield Draft(text, ContainsGrader(Terms(any=answers)), answers[0], level)


SECTIONS = (Section("translation", 15, _translations),)
