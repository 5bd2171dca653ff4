"""The fifty states of the USA: capital, postal code, region and cities.

City names that belong to well-known places in several states (Portland, Kansas City, ...) are left out, so that a city
always names one state. New York City is left out because its short name is the name of its state.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class State:
    """One state and the facts the corpus states about it."""

    name: str
    capital: str
    code: str
    region: str
    cities: tuple[str, ...]
    """Cities other than the capital."""


_TABLE = """
Alabama | Montgomery | AL | South
    Mobile, Huntsville, Tuscaloosa, Birmingham, Dothan, Hoover, Gadsden, Anniston
Alaska | Juneau | AK | West
    Anchorage, Fairbanks, Sitka, Ketchikan, Wasilla, Kodiak, Nome, Kenai
Arizona | Phoenix | AZ | West
    Tucson, Mesa, Scottsdale, Tempe, Flagstaff, Yuma, Chandler, Prescott
Arkansas | Little Rock | AR | South
    Fort Smith, Pine Bluff, Bentonville, Springdale, Hot Springs, Searcy, Jonesboro
California | Sacramento | CA | West
    Los Angeles, San Francisco, San Diego, Oakland, Fresno, San Jose, Anaheim, Bakersfield
Colorado | Denver | CO | West
    Boulder, Colorado Springs, Pueblo, Fort Collins, Durango, Aspen, Loveland, Vail
Connecticut | Hartford | CT | Northeast
    Bridgeport, New Haven, Stamford, Waterbury, Norwalk, Danbury, Greenwich
Delaware | Dover | DE | South
    Rehoboth Beach, Bethany Beach, Lewes, Seaford, Harrington, Elsmere, Millsboro, Selbyville
Florida | Tallahassee | FL | South
    Miami, Orlando, Tampa, Jacksonville, Pensacola, Sarasota, Gainesville, Fort Lauderdale
Georgia | Atlanta | GA | South
    Savannah, Macon, Marietta, Valdosta, Dalton, Alpharetta, Brunswick, Statesboro
Hawaii | Honolulu | HI | West
    Hilo, Kailua, Lahaina, Kapolei, Waipahu, Kahului, Pearl City, Kihei
Idaho | Boise | ID | West
    Nampa, Pocatello, Idaho Falls, Twin Falls, Rexburg, Sandpoint, Caldwell, Ketchum
Illinois | Springfield | IL | Midwest
    Chicago, Joliet, Naperville, Rockford, Evanston, Champaign, Elgin, Waukegan
Indiana | Indianapolis | IN | Midwest
    Fort Wayne, Evansville, South Bend, Gary, Muncie, Terre Haute, Kokomo, Elkhart
Iowa | Des Moines | IA | Midwest
    Cedar Rapids, Davenport, Sioux City, Dubuque, Ames, Waterloo, Council Bluffs, Iowa City
Kansas | Topeka | KS | Midwest
    Wichita, Overland Park, Olathe, Salina, Hutchinson, Dodge City, Emporia, Leavenworth
Kentucky | Frankfort | KY | South
    Louisville, Lexington, Bowling Green, Owensboro, Covington, Paducah, Hopkinsville
Louisiana | Baton Rouge | LA | South
    New Orleans, Shreveport, Lake Charles, Bossier City, Houma, Slidell, Natchitoches
Maine | Augusta | ME | Northeast
    Bangor, Biddeford, Bar Harbor, Saco, Kennebunk, Presque Isle, Ellsworth, Westbrook
Maryland | Annapolis | MD | South
    Baltimore, Bethesda, Rockville, Gaithersburg, Hagerstown, Towson, Ocean City, Frederick
Massachusetts | Boston | MA | Northeast
    Worcester, Lowell, Cambridge, Quincy, Brockton, Fall River, New Bedford, Pittsfield
Michigan | Lansing | MI | Midwest
    Detroit, Grand Rapids, Flint, Ann Arbor, Kalamazoo, Saginaw, Dearborn, Battle Creek
Minnesota | Saint Paul | MN | Midwest
    Minneapolis, Duluth, Mankato, Moorhead, Saint Cloud, Winona, Brainerd, Bemidji
Mississippi | Jackson | MS | South
    Biloxi, Gulfport, Tupelo, Hattiesburg, Natchez, Vicksburg, Pascagoula, Starkville
Missouri | Jefferson City | MO | Midwest
    Saint Louis, Branson, Independence, Joplin, Saint Joseph, Sedalia, Hannibal
Montana | Helena | MT | West
    Billings, Missoula, Bozeman, Butte, Great Falls, Kalispell, Havre, Whitefish
Nebraska | Lincoln | NE | Midwest
    Omaha, Grand Island, Kearney, North Platte, Hastings, Scottsbluff, Ogallala, Papillion
Nevada | Carson City | NV | West
    Las Vegas, Reno, Henderson, Sparks, Elko, Mesquite, Winnemucca, Laughlin
New Hampshire | Concord | NH | Northeast
    Nashua, Keene, Portsmouth, Laconia, Hanover, Manchester, Derry, Exeter
New Jersey | Trenton | NJ | Northeast
    Newark, Jersey City, Hoboken, Camden, Atlantic City, Paterson, Princeton, Passaic
New Mexico | Santa Fe | NM | West
    Albuquerque, Las Cruces, Roswell, Taos, Gallup, Alamogordo, Farmington, Los Alamos
New York | Albany | NY | Northeast
    Buffalo, Syracuse, Yonkers, Ithaca, Utica, Poughkeepsie, Schenectady, Binghamton
North Carolina | Raleigh | NC | South
    Charlotte, Durham, Greensboro, Asheville, Hickory, Gastonia, Chapel Hill, Kinston
North Dakota | Bismarck | ND | Midwest
    Fargo, Grand Forks, Minot, Williston, Dickinson, Mandan, Wahpeton, Devils Lake
Ohio | Columbus | OH | Midwest
    Cleveland, Cincinnati, Toledo, Akron, Dayton, Youngstown, Sandusky, Canton
Oklahoma | Oklahoma City | OK | South
    Tulsa, Norman, Broken Arrow, Lawton, Enid, Muskogee, Bartlesville, Ponca City
Oregon | Salem | OR | West
    Eugene, Bend, Medford, Gresham, Corvallis, Beaverton, Astoria, Klamath Falls
Pennsylvania | Harrisburg | PA | Northeast
    Philadelphia, Pittsburgh, Allentown, Scranton, Erie, Reading, Bethlehem, Altoona
Rhode Island | Providence | RI | Northeast
    Newport, Pawtucket, Cranston, Warwick, Woonsocket, Westerly, Narragansett, Tiverton
South Carolina | Columbia | SC | South
    Myrtle Beach, Spartanburg, Greenville, Hilton Head, Rock Hill, Sumter, Beaufort, Aiken
South Dakota | Pierre | SD | Midwest
    Sioux Falls, Rapid City, Aberdeen, Deadwood, Brookings, Mitchell, Yankton, Huron
Tennessee | Nashville | TN | South
    Memphis, Knoxville, Chattanooga, Clarksville, Murfreesboro, Kingsport, Oak Ridge, Gatlinburg
Texas | Austin | TX | South
    Dallas, Houston, San Antonio, El Paso, Fort Worth, Lubbock, Waco, Amarillo
Utah | Salt Lake City | UT | West
    Provo, Ogden, Moab, Saint George, Logan, Park City, Orem, Layton
Vermont | Montpelier | VT | Northeast
    Burlington, Rutland, Brattleboro, Stowe, Bennington, Barre, Winooski, Middlebury
Virginia | Richmond | VA | South
    Norfolk, Virginia Beach, Roanoke, Alexandria, Charlottesville, Newport News, Williamsburg, Chesapeake
Washington | Olympia | WA | West
    Seattle, Spokane, Tacoma, Bellevue, Yakima, Everett, Walla Walla, Redmond
West Virginia | Charleston | WV | South
    Wheeling, Morgantown, Huntington, Parkersburg, Beckley, Martinsburg, Harpers Ferry
Wisconsin | Madison | WI | Midwest
    Milwaukee, Green Bay, Kenosha, Racine, Eau Claire, Oshkosh, La Crosse, Appleton
Wyoming | Cheyenne | WY | West
    Casper, Laramie, Cody, Sheridan, Rock Springs, Gillette, Riverton, Rawlins
"""


def _parse(line: str, cities: str) -> State:
    name, capital, code, region = (field.strip() for field in line.split("|"))
    return State(name, capital, code, region, tuple(city.strip() for city in cities.split(",")))


_LINES = _TABLE.strip().splitlines()

STATES: tuple[State, ...] = tuple(map(_parse, _LINES[::2], _LINES[1::2]))
"""All fifty states in alphabetical order."""
