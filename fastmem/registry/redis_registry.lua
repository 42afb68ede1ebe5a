-- Every operation of RedisFixRegistry, each one atomic because it is one call of this script.
--
-- KEYS  1 the registry's own hash, 2 the sorted set of deaths
-- ARGV  1 operation, 2 what an entry's key begins with, 3 rate, 4 linear, 5 floor, 6 capacity (0: no bound), then the
--       operation's own
--
-- An entry is a hash under its canonical text. The sorted set holds, by the epoch in which it will die, a member for each
-- entry: 16 digits that grow with every event, then the text, so that of one epoch the one longest there comes first.
-- Numbers that are no integers travel as text of 17 digits, which doubles survive.
local SCHEMA = 1
local FOLLOWED = 4096 -- epochs that are followed one by one, as the table in memory does; beyond, the closed form

local meta, deaths = KEYS[1], KEYS[2]
local operation, entries = ARGV[1], ARGV[2]
local rate, linear, floor, capacity = tonumber(ARGV[3]), tonumber(ARGV[4]), tonumber(ARGV[5]), tonumber(ARGV[6])
local epoch, fresh_lifetime

local function refuse(reason)
  error('FASTMEM<' .. reason .. '>', 0)
end

local function exact(number)
  return string.format('%.17g', number)
end

local function after(strength, epochs)
  local followed = math.min(epochs, FOLLOWED)
  for _ = 1, followed do
    local following = math.max(0, strength * rate - linear)
    if following == strength then return strength end
    strength = following
  end
  if epochs == followed then return strength end
  local more = epochs - followed
  if rate == 1 then return math.max(0, strength - linear * more) end
  local power = rate ^ more
  return math.max(0, strength * power - linear * (1 - power) / (1 - rate))
end

-- Epochs until it is below the floor.
local function lifetime(strength)
  local s = strength
  for i = 1, FOLLOWED do
    local following = math.max(0, s * rate - linear)
    if following < floor then return i end
    if following == s then return math.huge end
    s = following
  end
  local more
  if rate == 1 then
    more = (s - floor) / linear
  else
    local rest = linear / (1 - rate)
    if floor + rest <= 0 then return math.huge end
    more = math.log((floor + rest) / (s + rest)) / math.log(rate)
  end
  local life = FOLLOWED + math.max(1, math.ceil(more))
  if not (life < 4294967294) then return math.huge end
  while life > FOLLOWED + 1 and after(strength, life - 1) < floor do life = life - 1 end
  while not (after(strength, life) < floor) do life = life + 1 end
  return life
end

-- The rule and the epoch; a registry that is not there is begun, one that is other than the client thinks is refused.
local function begin(any_rule)
  local known = redis.call('HMGET', meta, 'schema', 'rate', 'linear', 'floor', 'lifetime', 'epoch')
  if not known[1] then
    if redis.call('EXISTS', meta) == 1 then refuse('foreign: ' .. meta) end
    epoch, fresh_lifetime = 0, lifetime(1)
    redis.call('HSET', meta, 'schema', SCHEMA, 'rate', ARGV[3], 'linear', ARGV[4], 'floor', ARGV[5],
      'lifetime', exact(fresh_lifetime), 'epoch', 0)
    return
  end
  local schema = tonumber(known[1])
  if not schema or schema < 1 then refuse('foreign: ' .. meta) end
  if schema > SCHEMA then refuse('newer: ' .. known[1]) end
  for i = 2, 6 do
    if not tonumber(known[i]) then refuse('foreign: ' .. meta) end
  end
  local same = tonumber(known[2]) == rate and tonumber(known[3]) == linear and tonumber(known[4]) == floor
  if not same and not any_rule then refuse('rule: ' .. known[2] .. ' ' .. known[3] .. ' ' .. known[4]) end
  rate, linear, floor = tonumber(known[2]), tonumber(known[3]), tonumber(known[4])
  fresh_lifetime, epoch = tonumber(known[5]), tonumber(known[6])
end

local function now(entry)
  return after(entry.strength, epoch - entry.touched)
end

local function find(text)
  local e = redis.call('HMGET', entries .. text, 'fix', 'order', 'strength', 'touched', 'created', 'successes', 'failures',
    'last_success', 'last_access')
  if not e[1] then
    if redis.call('EXISTS', entries .. text) == 1 then refuse('foreign: ' .. entries .. text) end
    return nil
  end
  for i = 2, 7 do
    if not tonumber(e[i]) then refuse('foreign: ' .. entries .. text) end
  end
  return { fix = e[1], order = e[2], strength = tonumber(e[3]), touched = tonumber(e[4]), created = e[5],
    successes = e[6], failures = e[7], last_success = e[8], last_access = e[9] }
end

-- Gives an entry its strength as of now, its turn among those that die with it, and what else is passed.
local function settle(text, known, strength, ...)
  local life = strength == 1 and fresh_lifetime or lifetime(strength)
  local order = string.format('%016d', redis.call('HINCRBY', meta, 'order', 1))
  if known then redis.call('ZREM', deaths, known.order .. text) end
  redis.call('ZADD', deaths, life == math.huge and '+inf' or exact(epoch + life), order .. text)
  redis.call('HSET', entries .. text, 'strength', exact(strength), 'touched', epoch, 'order', order, ...)
end

-- Drops the entries of these members; one whose turn has changed is another one by now.
local function drop(members)
  for _, member in ipairs(members) do
    local key = entries .. string.sub(member, 17)
    if redis.call('HGET', key, 'order') == string.sub(member, 1, 16) then redis.call('UNLINK', key) end
    redis.call('ZREM', deaths, member)
  end
end

local function make_room()
  while capacity > 0 and redis.call('ZCARD', deaths) >= capacity do
    drop(redis.call('ZRANGE', deaths, 0, 0))
  end
end

local function look_up(text)
  local found = redis.call('HMGET', entries .. text, 'fix', 'last_access')
  if found[1] and tonumber(found[2]) ~= epoch then redis.call('HSET', entries .. text, 'last_access', epoch) end
  return found[1]
end

local run = {}

function run.open()
  return { exact(rate), exact(linear), exact(floor) }
end

-- Texts. For each its fix, or false.
function run.lookup()
  local fixes, hits = {}, 0
  for i = 7, #ARGV do
    local fix = look_up(ARGV[i])
    if fix then hits = hits + 1 end
    fixes[#fixes + 1] = fix
  end
  if hits > 0 then redis.call('HINCRBY', meta, 'hits', hits) end
  if hits < #fixes then redis.call('HINCRBY', meta, 'misses', #fixes - hits) end
  return fixes
end

-- Pairs of text and fix.
function run.register()
  redis.call('ZCARD', deaths) -- fails before anything is written where that key is not ours
  local known = {}
  for i = 7, #ARGV, 2 do known[i] = find(ARGV[i]) end
  for i = 7, #ARGV, 2 do
    local text, fix = ARGV[i], ARGV[i + 1]
    local entry = find(text) -- an earlier pair may have made or evicted it
    if entry then
      settle(text, entry, 1, 'fix', fix, 'last_access', epoch)
    else
      make_room()
      settle(text, nil, 1, 'fix', fix, 'created', epoch, 'last_access', epoch, 'successes', 0, 'failures', 0)
    end
  end
  redis.call('HINCRBY', meta, 'registrations', (#ARGV - 6) / 2)
  return 1
end

-- Text, gain.
function run.success()
  local entry = find(ARGV[7])
  if not entry then return 0 end
  settle(ARGV[7], entry, math.min(1, now(entry) + tonumber(ARGV[8])), 'last_success', epoch, 'last_access', epoch,
    'successes', entry.successes + 1)
  return 1
end

-- Text, loss.
function run.failure()
  local entry = find(ARGV[7])
  if not entry then return 0 end
  local left = math.max(0, now(entry) - tonumber(ARGV[8]))
  if left < floor then
    drop({ entry.order .. ARGV[7] })
    redis.call('HINCRBY', meta, 'pruned', 1)
  else
    settle(ARGV[7], entry, left, 'last_access', epoch, 'failures', entry.failures + 1)
  end
  return 1
end

function run.epoch()
  local pruned = 0
  redis.call('ZCARD', deaths)
  epoch = redis.call('HINCRBY', meta, 'epoch', 1)
  repeat
    local dead = redis.call('ZRANGEBYSCORE', deaths, '-inf', epoch, 'LIMIT', 0, 1000)
    drop(dead)
    pruned = pruned + #dead
  until #dead == 0
  if pruned > 0 then redis.call('HINCRBY', meta, 'pruned', pruned) end
  return pruned
end

function run.clear()
  repeat
    local some = redis.call('ZRANGE', deaths, 0, 999)
    drop(some)
  until #some == 0
  return 1
end

-- Texts. For each {fix, strength now, strength when touched, touched, created, last success, last access, successes,
-- failures}, or false.
function run.rows()
  local rows = {}
  for i = 7, #ARGV do
    local e = find(ARGV[i])
    rows[#rows + 1] = e and { e.fix, exact(now(e)), exact(e.strength), e.touched, e.created, e.last_success or '',
      e.last_access or '', e.successes, e.failures } or false
  end
  return rows
end

function run.counts()
  local some = redis.call('ZRANGE', deaths, 0, 15)
  local bytes = 0
  for _, member in ipairs(some) do
    bytes = bytes + (redis.call('MEMORY', 'USAGE', entries .. string.sub(member, 17)) or 0)
  end
  local count = redis.call('ZCARD', deaths)
  if count > 0 then bytes = bytes / #some * count + redis.call('MEMORY', 'USAGE', deaths) end
  local counts = redis.call('HMGET', meta, 'hits', 'misses', 'registrations', 'pruned')
  return { counts[1] or 0, counts[2] or 0, epoch, count, math.floor(bytes), counts[3] or 0, counts[4] or 0 }
end

-- Eights of text, fix, strength as of now, created, last success, last access, successes, failures. How many are new;
-- those that are known are left as they are.
function run.restore()
  local new = 0
  redis.call('ZCARD', deaths)
  for i = 7, #ARGV, 8 do
    local text = ARGV[i]
    if not find(text) then
      settle(text, nil, tonumber(ARGV[i + 2]), 'fix', ARGV[i + 1], 'created', ARGV[i + 3], 'last_success', ARGV[i + 4],
        'last_access', ARGV[i + 5], 'successes', ARGV[i + 6], 'failures', ARGV[i + 7])
      new = new + 1
    end
  end
  return new
end

-- Epoch, hits, misses, for a registry that holds nothing.
function run.resume()
  if redis.call('ZCARD', deaths) > 0 then return 0 end
  redis.call('HSET', meta, 'epoch', ARGV[7], 'hits', ARGV[8], 'misses', ARGV[9])
  return 1
end

begin(operation == 'open' and ARGV[7] == 'any')
return run[operation]()
