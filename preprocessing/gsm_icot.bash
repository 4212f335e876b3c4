#!/usr/bin/env bash
# Fetch GSM8K-aug into data/gsm_{train,valid,test}.txt and convert it to JSON.
#
#   bash preprocessing/gsm_icot.bash
#
# The files come from the Internalize_CoT_Step_by_Step project at a fixed commit and are accepted
# only with the expected sha256. An interrupted download stays as a .part file, which the next
# attempt or the next run continues; the final name appears only once the checksum is right.
# Needs bash, curl, python3, and sha256sum or shasum. Settings, all optional:
#   GSM_ICOT_MIRROR   base URL that serves train.txt, valid.txt and test.txt (same checksums)
#   GSM_ICOT_SUMS     file in sha256sum's format to check against instead of the published checksums
#   GSM_ICOT_TRIES    attempts per file (5)
#   GSM_ICOT_STALL_S  seconds below 1 kB/s after which an attempt is abandoned (30)
#   PYTHON            interpreter for the conversion (python3)
set -euo pipefail

repository=da03/Internalize_CoT_Step_by_Step
commit=e06a32ee5e4cd117171daeb4755d2a97ece62761
published_sums="\
0a3909a9e7d8d2f7ad6b8c7b5608aa744988d835f9bf874d4cf06ca77df6bf8c  train.txt
04f9bddfe8ac4846571b1e2b612b289c95770b5012fdb34cc36a597b041afb87  valid.txt
e464efa2713fbcf423bdbfb482c543a6a086188c3d97c294b1d19a70c2a515e8  test.txt"

tries=${GSM_ICOT_TRIES:-5}
stall_s=${GSM_ICOT_STALL_S:-30}
python=${PYTHON:-python3}
converter=$(dirname "${BASH_SOURCE[0]}")/gsm_icot.py

say() { echo "gsm_icot: $*"; }
fail() { say "$*" >&2; exit 2; }

url_of() {
    if [[ -n ${GSM_ICOT_MIRROR:-} ]]; then
        echo "${GSM_ICOT_MIRROR%/}/$1"
    elif [[ $1 == train.txt ]]; then
        # Kept in large-file storage: the raw host would serve its 133-byte pointer.
        echo "https://media.githubusercontent.com/media/$repository/$commit/data/gsm8k/$1"
    else
        echo "https://raw.githubusercontent.com/$repository/$commit/data/gsm8k/$1"
    fi
}

sum_of() {
    if command -v sha256sum >/dev/null; then sha256sum <"$1"; else shasum -a 256 <"$1"; fi |
        cut -d ' ' -f 1
}

wanted_sum() { awk -v name="$1" '$2 == name { print $1 }' <<<"$sums"; }

reason() {
    case $1 in
        5 | 6 | 7) echo "the server cannot be reached (curl $1)" ;;
        18) echo "the transfer was cut short" ;;
        22) echo "the server answered $2" ;;
        23) echo "the disk cannot be written" ;;
        28) echo "the transfer stalled" ;;
        *) echo "curl ended with status $1" ;;
    esac
}

# One attempt that continues the .part file; leaves the outcome in $code and $http.
attempt() {
    local quiet=--silent
    [[ -t 2 ]] && quiet=--progress-bar
    code=0
    http=$(curl "$quiet" --fail --location --continue-at - --connect-timeout "$stall_s" \
        --speed-limit 1000 --speed-time "$stall_s" --write-out '%{http_code}' \
        --output "$2" "$1") || code=$?
}

download() {
    local url=$1 part=$2 try
    for ((try = 1; try <= tries; try++)); do
        ((try == 1)) || sleep 1
        attempt "$url" "$part"
        if ((code == 0)); then return; fi
        if [[ $code == 33 || $code == 36 || $http == 416 ]]; then
            # The server cannot continue this file, so it is fetched from its beginning.
            rm -f "$part"
        elif [[ $code == 22 && $http == 4* && $http != 408 && $http != 429 ]]; then
            break
        fi
    done
    fail "$url: $(reason "$code" "$http"); check the network, or set GSM_ICOT_MIRROR to a" \
        "server that holds train.txt, valid.txt and test.txt, then run again (the part is kept)"
}

fetch() {
    local name=$1 target=data/gsm_$1 part=data/gsm_$1.part url wanted got resumed
    url=$(url_of "$name")
    wanted=$(wanted_sum "$name")
    [[ -n $wanted ]] || fail "$GSM_ICOT_SUMS: no sum for $name, wanted a line 'sha256  $name'"
    if [[ -e $target ]]; then
        [[ $(sum_of "$target") == "$wanted" ]] ||
            fail "$target: exists but is not the expected file; move it away and run again"
        say "$target exists already, checksum right"
        return
    fi
    while :; do
        resumed=
        if [[ -s $part ]]; then
            resumed=yes
            if [[ $(sum_of "$part") == "$wanted" ]]; then break; fi
        fi
        say "fetching $url${resumed:+ (continuing $part)}"
        download "$url" "$part"
        got=$(sum_of "$part")
        if [[ $got == "$wanted" ]]; then break; fi
        rm -f "$part"
        # A wrong beginning left by an earlier run may be the cause: fetch once more from the start.
        [[ -n $resumed ]] ||
            fail "$url: sha256 is $got, wanted $wanted; the server sent another file, removed"
    done
    mv "$part" "$target"
    say "$target fetched, checksum right"
}

for tool in curl "$python"; do
    command -v "$tool" >/dev/null || fail "$tool is missing; install it and run again"
done
command -v sha256sum >/dev/null || command -v shasum >/dev/null ||
    fail "sha256sum and shasum are missing; install one and run again"
[[ $tries =~ ^[1-9][0-9]*$ && $stall_s =~ ^[1-9][0-9]*$ ]] ||
    fail "GSM_ICOT_TRIES='$tries', GSM_ICOT_STALL_S='$stall_s': wanted whole numbers of at least 1"
sums=$published_sums
if [[ -n ${GSM_ICOT_SUMS:-} ]]; then
    [[ -r $GSM_ICOT_SUMS ]] || fail "$GSM_ICOT_SUMS: cannot be read; GSM_ICOT_SUMS names it"
    sums=$(<"$GSM_ICOT_SUMS")
    say "checking against $GSM_ICOT_SUMS instead of the published checksums"
fi
mkdir -p data
for name in valid.txt test.txt train.txt; do fetch "$name"; done
for split in train valid test; do "$python" "$converter" "$split"; done
