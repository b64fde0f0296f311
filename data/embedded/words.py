"""Word lists of the pre-training corpus of `glm-edge-nano`, Chinese and English side by side.

Plain data, used by `corpus.py` alone. Each pair is (Chinese, English).
"""

from __future__ import annotations

Pair = tuple[str, str]

ANIMALS: tuple[Pair, ...] = (
    ("猫", "cat"), ("狗", "dog"), ("兔子", "rabbit"), ("马", "horse"), ("牛", "cow"), ("羊", "sheep"),
    ("鸡", "chicken"), ("鸭子", "duck"), ("鸟", "bird"), ("鱼", "fish"), ("老虎", "tiger"), ("狮子", "lion"),
    ("大象", "elephant"), ("猴子", "monkey"), ("熊猫", "panda"), ("狐狸", "fox"), ("松鼠", "squirrel"),
    ("青蛙", "frog"), ("乌龟", "turtle"), ("蜜蜂", "bee"), ("蝴蝶", "butterfly"), ("老鼠", "mouse"), ("狼", "wolf"),
    ("鹿", "deer"), ("海豚", "dolphin"), ("企鹅", "penguin"),
)  # fmt: skip
FRUITS: tuple[Pair, ...] = (
    ("苹果", "apple"), ("香蕉", "banana"), ("橙子", "orange"), ("葡萄", "grape"), ("西瓜", "watermelon"),
    ("桃子", "peach"), ("梨", "pear"), ("草莓", "strawberry"), ("柠檬", "lemon"), ("樱桃", "cherry"),
    ("芒果", "mango"), ("菠萝", "pineapple"),
)  # fmt: skip
VEGETABLES: tuple[Pair, ...] = (
    ("白菜", "cabbage"), ("土豆", "potato"), ("西红柿", "tomato"), ("黄瓜", "cucumber"), ("胡萝卜", "carrot"),
    ("洋葱", "onion"), ("茄子", "eggplant"), ("南瓜", "pumpkin"), ("蘑菇", "mushroom"), ("菠菜", "spinach"),
)  # fmt: skip
FOODS: tuple[Pair, ...] = (
    ("米饭", "rice"), ("面条", "noodles"), ("饺子", "dumplings"), ("包子", "buns"), ("面包", "bread"),
    ("鸡蛋", "eggs"), ("豆腐", "tofu"), ("牛肉", "beef"), ("汤", "soup"), ("蛋糕", "cake"), ("粥", "porridge"),
    ("沙拉", "salad"),
)  # fmt: skip
DRINKS: tuple[Pair, ...] = (
    ("水", "water"), ("茶", "tea"), ("咖啡", "coffee"), ("牛奶", "milk"), ("果汁", "juice"), ("豆浆", "soy milk"),
)  # fmt: skip
CLOTHES: tuple[Pair, ...] = (
    ("衬衫", "shirt"), ("裤子", "trousers"), ("裙子", "skirt"), ("外套", "coat"), ("帽子", "hat"), ("鞋", "shoes"),
    ("袜子", "socks"), ("围巾", "scarf"), ("手套", "gloves"), ("毛衣", "sweater"),
)  # fmt: skip
OBJECTS: tuple[Pair, ...] = (
    ("桌子", "table"), ("椅子", "chair"), ("床", "bed"), ("灯", "lamp"), ("门", "door"), ("窗户", "window"),
    ("书", "book"), ("笔", "pen"), ("纸", "paper"), ("杯子", "cup"), ("盘子", "plate"), ("刀", "knife"),
    ("钥匙", "key"), ("手机", "phone"), ("电脑", "computer"), ("钟", "clock"), ("镜子", "mirror"), ("伞", "umbrella"),
    ("包", "bag"), ("球", "ball"), ("自行车", "bicycle"), ("箱子", "box"), ("毛巾", "towel"), ("牙刷", "toothbrush"),
    ("盒子", "case"), ("瓶子", "bottle"),
)  # fmt: skip
VEHICLES: tuple[Pair, ...] = (
    ("火车", "train"), ("飞机", "plane"), ("汽车", "car"), ("公共汽车", "bus"), ("船", "boat"), ("地铁", "subway"),
    ("出租车", "taxi"), ("自行车", "bicycle"),
)  # fmt: skip
PLACES: tuple[Pair, ...] = (
    ("公园", "the park"), ("学校", "school"), ("图书馆", "the library"), ("医院", "the hospital"),
    ("超市", "the supermarket"), ("海边", "the seaside"), ("山上", "the mountain"), ("河边", "the river"),
    ("商店", "the shop"), ("饭店", "the restaurant"), ("办公室", "the office"), ("车站", "the station"),
    ("花园", "the garden"), ("博物馆", "the museum"), ("电影院", "the cinema"), ("银行", "the bank"),
    ("农场", "the farm"), ("动物园", "the zoo"), ("体育馆", "the gym"), ("厨房", "the kitchen"),
)  # fmt: skip
CITIES: tuple[Pair, ...] = (
    ("北京", "Beijing"), ("上海", "Shanghai"), ("广州", "Guangzhou"), ("成都", "Chengdu"), ("西安", "Xi'an"),
    ("杭州", "Hangzhou"), ("南京", "Nanjing"), ("昆明", "Kunming"), ("巴黎", "Paris"), ("伦敦", "London"),
    ("东京", "Tokyo"), ("纽约", "New York"), ("罗马", "Rome"), ("柏林", "Berlin"),
)  # fmt: skip
PEOPLE: tuple[Pair, ...] = (
    ("爸爸", "my father"), ("妈妈", "my mother"), ("哥哥", "my brother"), ("姐姐", "my sister"),
    ("爷爷", "my grandfather"), ("奶奶", "my grandmother"), ("老师", "the teacher"), ("医生", "the doctor"),
    ("朋友", "my friend"), ("邻居", "my neighbour"), ("同学", "my classmate"), ("同事", "my colleague"),
    ("叔叔", "my uncle"), ("阿姨", "my aunt"),
)  # fmt: skip
NAMES: tuple[Pair, ...] = (
    ("小明", "Tom"), ("小红", "Anna"), ("小华", "Peter"), ("小丽", "Lucy"), ("小刚", "Jack"), ("小芳", "Mary"),
    ("李雷", "Sam"), ("王芳", "Emma"), ("张伟", "David"), ("刘洋", "Linda"), ("陈静", "Alice"), ("赵强", "Ben"),
)  # fmt: skip
SPORTS: tuple[Pair, ...] = (
    ("足球", "football"), ("篮球", "basketball"), ("网球", "tennis"), ("乒乓球", "table tennis"),
    ("羽毛球", "badminton"), ("排球", "volleyball"), ("游泳", "swimming"), ("跑步", "running"), ("滑雪", "skiing"),
    ("骑车", "cycling"),
)  # fmt: skip
SUBJECTS: tuple[Pair, ...] = (
    ("数学", "maths"), ("语文", "Chinese"), ("英语", "English"), ("历史", "history"), ("地理", "geography"),
    ("音乐", "music"), ("美术", "art"), ("物理", "physics"), ("化学", "chemistry"), ("生物", "biology"),
)  # fmt: skip
JOBS: tuple[tuple[str, str, str, str], ...] = (
    ("医生", "给病人看病", "doctor", "treats sick people"), ("老师", "教学生知识", "teacher", "teaches students"),
    ("厨师", "在厨房里做饭", "cook", "makes food in a kitchen"),
    ("司机", "开车送人", "driver", "drives people around"),
    ("农民", "在田里种粮食", "farmer", "grows food in the fields"), ("画家", "画画", "painter", "paints pictures"),
    ("作家", "写书", "writer", "writes books"), ("歌手", "唱歌", "singer", "sings songs"),
    ("警察", "保护大家的安全", "police officer", "keeps people safe"),
    ("护士", "照顾病人", "nurse", "takes care of patients"),
    ("工程师", "设计机器和桥", "engineer", "designs machines and bridges"),
    ("消防员", "灭火救人", "firefighter", "puts out fires"),
)  # fmt: skip
COLOURS: tuple[Pair, ...] = (
    ("红色", "red"), ("黄色", "yellow"), ("蓝色", "blue"), ("绿色", "green"), ("白色", "white"), ("黑色", "black"),
    ("紫色", "purple"), ("橙色", "orange"), ("灰色", "grey"), ("粉色", "pink"), ("棕色", "brown"),
)  # fmt: skip
COLOUR_OF: tuple[tuple[str, str, str, str], ...] = (
    ("天空", "蓝色", "the sky", "blue"), ("大海", "蓝色", "the sea", "blue"), ("草", "绿色", "grass", "green"),
    ("树叶", "绿色", "a leaf", "green"), ("雪", "白色", "snow", "white"), ("牛奶", "白色", "milk", "white"),
    ("香蕉", "黄色", "a banana", "yellow"), ("太阳", "黄色", "the sun", "yellow"),
    ("柠檬", "黄色", "a lemon", "yellow"), ("西红柿", "红色", "a tomato", "red"),
    ("草莓", "红色", "a strawberry", "red"), ("樱桃", "红色", "a cherry", "red"), ("煤", "黑色", "coal", "black"),
    ("乌鸦", "黑色", "a crow", "black"), ("葡萄", "紫色", "a grape", "purple"),
    ("茄子", "紫色", "an eggplant", "purple"), ("橙子", "橙色", "an orange", "orange"),
    ("胡萝卜", "橙色", "a carrot", "orange"), ("大象", "灰色", "an elephant", "grey"),
    ("咖啡", "棕色", "coffee", "brown"), ("云", "白色", "a cloud", "white"),
)  # fmt: skip
OPPOSITES: tuple[tuple[str, str, str, str], ...] = (
    ("大", "小", "big", "small"), ("高", "低", "high", "low"), ("长", "短", "long", "short"),
    ("快", "慢", "fast", "slow"), ("冷", "热", "cold", "hot"), ("新", "旧", "new", "old"), ("多", "少", "many", "few"),
    ("远", "近", "far", "near"), ("黑", "白", "black", "white"), ("开", "关", "open", "closed"),
    ("上", "下", "up", "down"), ("左", "右", "left", "right"), ("前", "后", "front", "back"),
    ("里", "外", "inside", "outside"), ("早", "晚", "early", "late"), ("轻", "重", "light", "heavy"),
    ("软", "硬", "soft", "hard"), ("干", "湿", "dry", "wet"), ("胖", "瘦", "fat", "thin"), ("好", "坏", "good", "bad"),
    ("真", "假", "true", "false"), ("强", "弱", "strong", "weak"), ("深", "浅", "deep", "shallow"),
    ("宽", "窄", "wide", "narrow"), ("安静", "吵闹", "quiet", "noisy"), ("简单", "复杂", "simple", "complex"),
    ("高兴", "难过", "happy", "sad"), ("干净", "脏", "clean", "dirty"), ("贵", "便宜", "expensive", "cheap"),
    ("容易", "难", "easy", "difficult"),
)  # fmt: skip
WEATHER: tuple[tuple[str, str, str, str], ...] = (
    ("下雨", "记得带伞", "rainy", "take an umbrella"), ("下雪", "路上要小心", "snowy", "be careful on the road"),
    ("晴天", "适合出去走走", "sunny", "go out for a walk"), ("刮风", "多穿一件衣服", "windy", "put on one more coat"),
    ("阴天", "可以在家看书", "cloudy", "read a book at home"), ("很热", "要多喝水", "hot", "drink more water"),
    ("很冷", "要戴手套和帽子", "cold", "wear gloves and a hat"), ("有雾", "开车要慢一点", "foggy", "drive slowly"),
)  # fmt: skip
ILLNESSES: tuple[tuple[str, str, str, str], ...] = (
    ("感冒了", "多喝热水，好好休息", "have a cold", "drink warm water and have a good rest"),
    ("头疼", "先睡一会儿，少看手机", "have a headache", "sleep for a while and look at the phone less"),
    ("肚子疼", "吃一点清淡的东西", "have a stomachache", "eat something light"),
    ("牙疼", "去看牙医，少吃糖", "have a toothache", "see a dentist and eat less sugar"),
    ("发烧了", "量一下体温，早点去看医生", "have a fever", "take your temperature and see a doctor soon"),
    ("睡不着", "晚上不要喝咖啡，听一点轻音乐", "cannot sleep", "avoid coffee at night and listen to soft music"),
    ("眼睛累", "看看远处，休息十分钟", "have tired eyes", "look into the distance and rest for ten minutes"),
    ("很紧张", "慢慢呼吸，想一想高兴的事", "feel nervous", "breathe slowly and think of something happy"),
)  # fmt: skip
DEFINITIONS: tuple[Pair, ...] = (
    ("医院", "医院是给病人看病的地方。"), ("学校", "学校是学生学习的地方。"), ("图书馆", "图书馆是借书和看书的地方。"),
    ("冰", "冰是水冷却以后变成的固体。"), ("彩虹", "彩虹是雨后阳光照在水滴上出现的彩色弧线。"),
    ("地球", "地球是我们居住的行星。"), ("太阳", "太阳是给地球带来光和热的恒星。"),
    ("月亮", "月亮是绕着地球转的卫星。"), ("火山", "火山是会喷出岩浆的山。"),
    ("沙漠", "沙漠是很少下雨、到处是沙子的地方。"), ("词典", "词典是用来查词语意思的书。"),
    ("时钟", "时钟是告诉我们时间的工具。"), ("雨伞", "雨伞是下雨时用来挡雨的工具。"),
    ("冰箱", "冰箱是让食物保持低温的电器。"), ("桥", "桥是让人和车过河的建筑。"),
    ("a clock", "A clock is a tool that tells us the time."),
    ("a library", "A library is a place where people read and borrow books."),
    ("ice", "Ice is water that has become solid because of the cold."),
    ("a bridge", "A bridge is a structure that lets people cross a river."),
    ("the moon", "The moon is a body that goes around the earth."),
    ("a desert", "A desert is a dry place with very little rain."),
    ("an umbrella", "An umbrella is a tool that keeps off the rain."),
    ("a dictionary", "A dictionary is a book that explains words."),
    ("a fridge", "A fridge is a machine that keeps food cold."),
    ("the sun", "The sun is a star that gives us light and heat."),
)  # fmt: skip
WEEKDAYS: tuple[Pair, ...] = (
    ("星期一", "Monday"), ("星期二", "Tuesday"), ("星期三", "Wednesday"), ("星期四", "Thursday"), ("星期五", "Friday"),
    ("星期六", "Saturday"), ("星期日", "Sunday"),
)  # fmt: skip
MONTHS: tuple[Pair, ...] = (
    ("一月", "January"), ("二月", "February"), ("三月", "March"), ("四月", "April"), ("五月", "May"), ("六月", "June"),
    ("七月", "July"), ("八月", "August"), ("九月", "September"), ("十月", "October"), ("十一月", "November"),
    ("十二月", "December"),
)  # fmt: skip
DAY_TIMES: tuple[Pair, ...] = (
    ("早上", "in the morning"), ("中午", "at noon"), ("下午", "in the afternoon"), ("晚上", "in the evening"),
    ("周末", "at the weekend"), ("昨天", "yesterday"), ("夏天", "in summer"), ("冬天", "in winter"),
    ("春天", "in spring"), ("秋天", "in autumn"),
)  # fmt: skip
ADJECTIVES: tuple[Pair, ...] = (
    ("漂亮", "beautiful"), ("有趣", "interesting"), ("安静", "quiet"), ("舒服", "comfortable"), ("干净", "clean"),
    ("特别", "special"), ("重要", "important"), ("普通", "ordinary"), ("奇怪", "strange"), ("好看", "pretty"),
    ("温暖", "warm"), ("方便", "convenient"), ("新鲜", "fresh"), ("可爱", "lovely"), ("结实", "strong"),
    ("便宜", "cheap"), ("明亮", "bright"), ("古老", "ancient"),
)  # fmt: skip
FEELINGS: tuple[Pair, ...] = (
    ("高兴", "happy"), ("难过", "sad"), ("累", "tired"), ("放松", "relaxed"), ("惊讶", "surprised"),
    ("害怕", "afraid"), ("满意", "pleased"),
)  # fmt: skip
ENGLISH_EXTRA: tuple[str, ...] = (
    "river", "cloud", "stone", "bridge", "market", "letter", "music", "winter", "silver", "garden", "button", "pocket",
    "paper", "forest", "island", "engine", "candle", "window", "basket", "dinner", "summer", "bottle", "camera",
    "doctor", "flower", "hammer", "jacket", "kitten", "ladder", "mirror", "needle", "orange", "pencil", "rocket",
    "school", "ticket", "violin", "wallet", "yellow", "cotton", "wool", "silk", "linen", "leather", "denim", "collar",
    "sleeve", "pattern", "colour", "fabric", "stripe", "dress", "pants", "style", "simple", "loose", "slim", "classic",
    "modern", "casual", "formal", "sport", "holiday", "office", "street", "travel", "party", "weekend", "soft",
    "smooth", "thick", "thin", "light", "warm", "cool", "round",
)  # fmt: skip
SYSTEM_PROMPTS: tuple[str, ...] = (
    "你是一个友好的助手。", "你是一个有用的助手，回答要简短。", "请用中文回答用户的问题。", "你是一位耐心的老师。",
    "你是小助手，说话很有礼貌。", "请认真回答每一个问题。", "You are a helpful assistant.",
    "Answer in short and clear sentences.", "You are a patient teacher.", "You are a friendly helper. Be polite.",
)  # fmt: skip
