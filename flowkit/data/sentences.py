"""Short plain sentences for voices to read, written for this purpose."""

SENTENCES = """
The old dog sleeps near the warm fire.
A child reads a small blue book.
We walked home through the quiet park.
She put three red apples on the table.
The train leaves the station at noon.
My brother plays the piano every evening.
Rain fell on the roof all night long.
They bought fresh bread and cheese.
The teacher asked a simple question.
He found a silver coin under the chair.
Birds sing in the garden before sunrise.
Please close the window behind you.
The moon was bright above the lake.
Our neighbor grows beans and yellow squash.
I lost my keys on the way to work.
The farmer feeds his horses twice a day.
A cold wind blew across the valley.
She wrote a long letter to her uncle.
The boys threw stones into the river.
He drinks his coffee without any sugar.
The museum opens again in the spring.
Two ships sailed slowly out of the harbor.
The cook chopped onions for the soup.
I can hear music from the next room.
The girl drew a picture of a giraffe.
Snow covered the path up the hill.
We need a larger box for these shoes.
The doctor told him to rest for a week.
Leaves turn brown and fall in October.
She laughed at the joke and went on.
The cat jumped over the low fence.
He fixed the broken wheel with a rope.
Every window in the house was open.
The bus was late again this morning.
A young man sold flowers on the corner.
They measured the length of the bridge.
My sister enjoys fishing in the ocean.
The judge gave a very short answer.
Put the clean cups back on the shelf.
The pilot could see the whole coast.
It was too dark to read the map.
The baker sold out of rolls by nine.
He wears a heavy coat in the winter.
The small boat rocked on the waves.
Both teams played well until the end.
She washed the dishes after supper.
An owl watched us from the oak tree.
The road turns sharply to the left.
I think the answer is on this page.
The mouse hid behind a pile of wood.
The band began to play a slow song.
We shared a pizza with our cousins.
The old clock in the hall has stopped.
He pushed the heavy door with his shoulder.
Bees were busy around the white roses.
The nurse gave the boy a glass of milk.
Grandmother keeps buttons in a tin box.
The sheep moved toward the wooden gate.
You should visit the castle on the island.
A thick fog came in from the sea.
The painter mixed green with a little gray.
I will call you when we get there.
The lawyer read the paper twice.
They built a house of brick and stone.
The puppy chewed on my favorite slipper.
Turn off the lights before you leave.
The waiter brought us bowls of hot soup.
She could not choose between the two hats.
The path goes around the edge of the forest.
He counted the money with great care.
The children shouted with joy at the snow.
We saw a fox cross the frozen field.
The judge wore a black robe and glasses.
A red kite flew high above the beach.
The milk in the kitchen has gone bad.
I usually go to bed before eleven.
The engine made a strange, rough noise.
She sewed a patch on his torn jeans.
The king lived in a house of glass.
His voice was soft but very clear.
The oven is still hot, so be careful.
They planted four pear trees by the wall.
The student forgot the name of the river.
We waited an hour for a table.
The thief ran down a narrow street.
My father taught me how to swim.
The soup needs salt and a bit of pepper.
A tall woman stood at the counter.
The carpet was thick and smelled of dust.
He made a chair from pieces of pine.
The plane flew low over the village.
Shadows moved along the garden path.
She keeps her rings in a velvet bag.
The coach told the players to run faster.
I would rather stay and watch the show.
The wolf howled at the edge of the camp.
We found shells of many shapes and sizes.
The price of sugar went up in June.
The boy carried water in a leather bag.
That yellow car belongs to the mayor.
The stream is clear and very shallow.
He opened the jar with a spoon.
An empty bottle rolled across the floor.
The choir sang in the church on Sunday.
The driver missed the turn at the mill.
She speaks five languages and loves to travel.
The candle burned down in an hour.
They argued about the rules of the game.
The ice on the pond is far too thin.
I gave my ticket to a man in uniform.
The lion yawned and closed its eyes.
The shop on the corner sells used books.
Her hands were cold, but her smile was warm.
The tower can be seen from every street.
We cut the cake into equal pieces.
The dentist works in the building next door.
A brown spider climbed up the wall.
He whistled a tune while he washed the car.
The first snow came in late November.
Some people never learn to cook.
The tailor measured his arms and chest.
The village has one school and two shops.
I broke the handle of the garden fork.
The ship's bell rang six times.
She poured the juice into a tall glass.
The desk was covered with maps and pens.
Goats can climb very steep rocks.
The young singer bowed to the crowd.
We heard thunder beyond the mountains.
The butcher wrapped the meat in paper.
Nobody knew where the noise came from.
The guard looked at us with suspicion.
He gave the boy a push on the swing.
The beach is empty at this time of year.
A good map would have saved us an hour.
The queen thanked the men for their service.
The juice of a lemon is sour.
My office is on the seventh floor.
They followed the tracks through the mud.
The orchestra tuned its violins.
The lamp beside the bed is broken.
I picked a bunch of purple grapes.
The mail arrives around half past ten.
The bridge was closed because of the flood.
She tied the horse to a thick post.
A pair of gloves lay on the bench.
The actor forgot his lines again.
We stayed at a cheap hotel by the airport.
The fisherman mended his nets at dawn.
The garden looks lovely after the rain.
He answered the phone with a deep sigh.
The soldiers marched along the dusty road.
Both of my aunts live in the north.
The museum shows tools made of bone.
The kettle began to whistle.
Our team lost the match by a single point.
The stairs lead down to a dark cellar.
She painted the fence a bright orange.
The professor explained the chart again.
You can borrow my umbrella if you like.
The sailor tied a knot in the rope.
Smoke rose from the chimney of the cottage.
The judge found the young man guilty.
The rabbit ran under the garden shed.
He lost his balance and fell on the grass.
The bread is still warm from the oven.
We watched the stars from the roof.
The carpenter used a sharp chisel.
The library is closed on Monday.
She asked for a room with a view.
A truck full of bricks blocked the road.
The nurse smiled and took his hand.
The pond is full of frogs in May.
They made a bridge of rope and wood.
The child was afraid of loud noises.
I have never seen such a large fish.
The cloth was as smooth as silk.
The mechanic changed the oil and the brakes.
He read the news over breakfast.
The church stands on top of a hill.
Her cousin works at a chocolate factory.
The wheels of the cart were made of oak.
The audience clapped for several minutes.
We dug a deep hole for the new tree.
The tide went out and left the boats on sand.
A stranger knocked at the back door.
The clown gave each child a balloon.
She hung the wet towels in the sun.
The drums were heard across the valley.
He chose the thickest branch for his swing.
The bank is across from the post office.
The ducks swim in a row behind their mother.
My watch is five minutes fast.
The snake slid quietly through the grass.
The vase fell and broke into pieces.
They spent the whole afternoon at the zoo.
The author signed copies of her novel.
The pipe under the sink began to leak.
I would like some more rice, please.
The hunter followed the deer to the creek.
The bell above the door rang softly.
We could smell the pine trees after the storm.
A large cloud hid the sun for a while.
The tourists took photos of the fountain.
He keeps his tools in a green box.
The cherry tree blooms in early April.
Her shoes were covered with yellow mud.
The referee blew his whistle twice.
The cave was deep and full of bats.
She learned to knit from her grandmother.
The chief asked the men to sit down.
The pages of this book are very thin.
A warm breeze came from the south.
The boy built a tower of wooden blocks.
They sell sausages and beer at the fair.
The car would not start this morning.
I saw your brother at the bakery.
The queue in front of the theater was long.
The farmer loaded hay onto the wagon.
He shaved his beard before the wedding.
The peaches are ripe and very sweet.
The new mayor promised to fix the streets.
The pigs slept in the shade of the barn.
She measured flour and butter for the pie.
The ferry crosses the channel in an hour.
We joined our friends at the gym.
The teacher praised the girl for her work.
A sharp pain shot through his knee.
The chairs in the kitchen need new paint.
The campers cooked fish over an open fire.
My aunt collects stamps and old coins.
The judge will hear the case on Thursday.
The toy robot walked in a circle.
You may leave your coat in the hall.
The shepherd counted his flock at dusk.
The noise of the city kept me awake.
He put a fresh sheet of paper on the desk.
The river is wide and slow near the town.
""".strip().splitlines()
