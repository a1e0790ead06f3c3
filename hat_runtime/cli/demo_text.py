"""What the demo asks by default: a text long enough that it goes up in several chunks, and a question about it."""

ARTICLE = """\
The lighthouse on Skarv Island was lit for the first time in the autumn of 1871. For sixty years its \
keepers carried oil up one hundred and twelve steps every evening, trimmed the wick at midnight and \
polished the great lens before breakfast. The lens had been made in Paris and shipped to the island in \
eleven crates packed with straw; one of them fell into the harbour and stayed there for a week before \
divers brought it up unharmed. In 1931 the lamp was changed to electricity. The keepers no longer \
carried oil, but they still climbed the steps, because the motor that turned the lens stopped whenever \
the wind blew hard from the north-east, and then somebody had to turn it by hand until morning.

The last keeper was Maren Holt. She came to the island as a child when her father took the post, and she \
stayed for forty-four years. She wrote down the weather three times a day in books bound in green cloth, \
together with everything else that she saw: whales, fishing boats, northern lights, and the number of \
seals on the rocks. Nobody had asked her to count the seals. When the light was made automatic in 1983 \
the coastguard wanted to throw the books away. A young biologist named Tomas Lind heard of it, borrowed \
a boat and took all one hundred and thirty-one of them home.

It took him six years to copy her numbers into tables. They showed that the seals had begun to leave the \
rocks twenty years before anyone else noticed, that they left first in the summers when the herring \
failed, and that they came back as soon as the fishing fleet was kept away from the strait in May. The \
strait is closed in May to this day. The green books now stand in a glass case in the town library, \
opened at a page on which Maren Holt wrote: "Fog. Nothing to be seen. Counted what I could hear."
"""

PROMPT = f"{ARTICLE}\nTell me about Maren Holt in your own words."
